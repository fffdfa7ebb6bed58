"""A smaller learning rate inside the optimizers' own steps."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _Step:
    """One step of an optimizer that is going on, and the groups whose rates it scaled."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.scaled: list[tuple[dict[str, Any], Any, Any]] = []


class RateLimit:
    """Scales the learning rates of optimizers inside their own steps, so that no schedule notices.

    From :meth:`tighten` on, a group steps with ``factor`` times its scheduled rate, and never with more than
    ``factor`` times the largest rate that it had until then: a schedule that still rises does not undo it. Over
    the first steps it may rise to that from zero, which is what a start without warm-up lacked.

    The rate that is scaled is the one that the optimizer is about to use: a step with a closure runs it with the
    rates unscaled, so that what a training step or a hook sets there counts. After the step a rate is what it was,
    unless somebody else has set it meanwhile. Until :meth:`tighten`, rates are read and never written.
    """

    def __init__(self) -> None:
        self.optimizers: list[Optimizer] = []
        self._handles: list[tuple[Any, Any]] = []
        self._going_on: list[_Step] = []
        self.reset()

    def reset(self) -> None:
        """As for a new run."""
        self.factor = 1.0
        self._is_tight = False
        self._warmup = 0
        self._steps: list[int] = []
        # By optimizer and group; a group that came later has no ceiling.
        self._peaks: list[list[Any]] = []
        self._ceilings: list[list[float]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the optimizers and their hooks."""
        return {**self.__dict__, "optimizers": [], "_handles": [], "_going_on": []}

    # Hooks of the optimizers

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Hook the steps of these optimizers, and no longer those before."""
        self.detach()
        self.optimizers = list(optimizers)
        for number, optimizer in enumerate(self.optimizers):
            before = optimizer.register_step_pre_hook(self._before_step(number))
            after = optimizer.register_step_post_hook(self._after_step(number))
            self._handles.append((before, after))
        self.settle()

    def detach(self) -> None:
        """Leave the optimizers as they were."""
        self.settle()
        for pair in self._handles:
            for handle in pair:
                handle.remove()
        self._handles, self.optimizers = [], []

    def settle(self) -> None:
        """Between steps: restore rates that an interrupted step left scaled, and be the last pre-step hook.

        A hook of the optimizer that runs before this one reads and sets the unscaled rate.
        """
        while self._going_on:
            self._undo(self._going_on.pop())
        self.stand_last()

    def stand_last(self) -> None:
        """Be the last of the hooks before a step, and the first after it."""
        for optimizer, (before, after) in zip(self.optimizers, self._handles, strict=True):
            first = getattr(optimizer, "_optimizer_step_pre_hooks", None)
            then = getattr(optimizer, "_optimizer_step_post_hooks", None)
            if first and next(reversed(first)) != before.id:
                first.move_to_end(before.id)
            if then and next(iter(then)) != after.id:
                then.move_to_end(after.id, last=False)

    def tighten(self, factor: float, warmup: int = 0) -> None:
        """Multiply the rates from now on, reached over so many steps; a second time, once more."""
        self.factor *= factor
        self._ceilings = [[float(peak) for peak in peaks] for peaks in self._peaks]
        self._warmup, self._steps = warmup, [0] * len(self._steps)
        self._is_tight = True

    # Inside of a step

    def _before_step(self, number: int) -> Any:
        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self._is_tight:
                return None
            self._extend(number)
            self._steps[number] += 1
            step = _Step(optimizer)
            self._going_on.append(step)
            self._scale(step, number)
            return self._with_closure(step, number, args, kwargs)

        return hook

    def _with_closure(
        self, step: _Step, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        def unscaled(closure: Callable[..., Any]) -> Callable[..., Any]:
            def run(*own: Any, **named: Any) -> Any:
                self._undo(step)
                out = closure(*own, **named)
                self._scale(step, number)
                return out

            return run

        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": unscaled(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # the first is the optimizer itself
            return (args[0], unscaled(args[1]), *args[2:]), kwargs
        return None

    def _scale(self, step: _Step, number: int) -> None:
        factor = self.factor * min(1.0, self._steps[number] / max(1, self._warmup))
        ceilings = self._ceilings[number] if number < len(self._ceilings) else []
        for index, group in enumerate(step.optimizer.param_groups):
            rate: Any = group.get("lr")
            if not _is_rate(rate) or self._is_scaled(group):
                continue
            ceiling = ceilings[index] if index < len(ceilings) else 0.0
            limited = rate if ceiling <= 0 else _at_most(rate, ceiling)
            group["lr"] = written = limited * factor
            step.scaled.append((group, rate, written))

    def _is_scaled(self, group: dict[str, Any]) -> bool:
        """Whether an optimizer around this one, with the same groups, has scaled it already."""
        return any(
            group is own and group["lr"] is written
            for step in self._going_on
            for own, _, written in step.scaled
        )

    def _undo(self, step: _Step) -> None:
        for group, before, written in step.scaled:
            if group.get("lr") is written:
                group["lr"] = before
        step.scaled.clear()

    def _after_step(self, number: int) -> Any:
        def hook(optimizer: Optimizer, *_: Any) -> None:
            if not self._is_tight:
                self._see(number, optimizer)
            if any(step.optimizer is optimizer for step in self._going_on):
                while (step := self._going_on.pop()).optimizer is not optimizer:
                    self._undo(step)  # one that raised inside of this one
                self._undo(step)

        return hook

    def _see(self, number: int, optimizer: Optimizer) -> None:
        """Remember the largest rate of each group."""
        self._extend(number)
        peaks = self._peaks[number]
        for index, group in enumerate(optimizer.param_groups):
            if index == len(peaks):
                peaks.append(0.0)
            rate: Any = group.get("lr")
            peak = peaks[index]
            if isinstance(rate, Tensor):
                # It may lie on the device: reading it would wait.
                rate = rate.detach()
                peaks[index] = torch.maximum(rate, torch.as_tensor(peak).to(rate))
            elif _is_rate(rate):
                peaks[index] = max(float(peak), float(rate))

    def _extend(self, number: int) -> None:
        while len(self._steps) <= number:
            self._steps.append(0)
        while len(self._peaks) <= number:
            self._peaks.append([])

    def state_dict(self) -> dict[str, Any]:
        """The factor, what the rates may not exceed, and how far the warm-up is."""
        return {
            "factor": self.factor,
            "is_tight": self._is_tight,
            "ceilings": [list(own) for own in self._ceilings],
            "peaks": [[float(peak) for peak in own] for own in self._peaks],
            "warmup": self._warmup,
            "steps": list(self._steps),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the rates of a checkpoint."""
        self.factor = float(state["factor"])
        self._is_tight = bool(state.get("is_tight", self.factor != 1))
        self._warmup, self._steps = int(state.get("warmup", 0)), list(state.get("steps", []))
        # In older checkpoints these are flat, for all optimizers together: only the first's are known.
        self._ceilings, self._peaks = _by_optimizer(state["ceilings"]), _by_optimizer(state["peaks"])


def _is_rate(rate: Any) -> bool:
    return isinstance(rate, Tensor) or (isinstance(rate, float | int) and not isinstance(rate, bool))


def _at_most(rate: Any, ceiling: float) -> Any:
    return rate.clamp(max=ceiling) if isinstance(rate, Tensor) else min(rate, ceiling)


def _by_optimizer(values: Sequence[Any]) -> list[list[Any]]:
    if values and not isinstance(values[0], list | tuple):
        return [list(values)]
    return [list(own) for own in values]
