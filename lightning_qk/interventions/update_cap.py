"""A cap on updates of query and key weights, relative to the weights, in spectral norm."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_qk._deprecated import old_spellings
from lightning_qk.functional.precision import at_least_float32
from lightning_qk.functional.singular import starting_subspace, subspace_iteration
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.interventions.head_scaler import HeadScaler, StoredRows, head_scalers
from lightning_qk.interventions.layers import matching_layers

# Vectors that follow the largest singular directions.
_VECTORS = 8


class Capped(NamedTuple):
    """The cap on the update of one matrix, as scalar tensors on its device.

    Attributes:
        factor: on the update, 1 where it was small enough.
        ratio: σ₁(ΔW)/σ₁(W) before the cap.
    """

    factor: Tensor
    ratio: Tensor


class UpdateCapper:
    r"""Scales an optimizer's updates of query and key weights: ``σ₁(ΔW) ≤ cap · σ₁(W)``.

    After Qi et al. 2025 (arXiv 2505.21910 [S]), who shrink the learning rate of a step to ``cap · σ₁(W)/σ₁(ΔW)``,
    since attention collapses by updates of few, large directions. Here what the optimizer has done is scaled,
    for each matrix by itself: right after the step ``W ← W_before + min(1, cap · σ₁(W_before)/σ₁(ΔW)) ΔW``, as if
    its learning rate (and weight decay) had been smaller. The optimizer's state is untouched; matrices whose
    update is small enough stay bit-identical. The matrices are all of a layer's query rows together and all of its
    key rows; biases are left alone.

    σ₁ is estimated by power iterations of eight vectors at once, which start from those of the last step: the
    estimate is at most σ₁. It falls short of it by less than a percent where a few directions stand out or
    updates resemble each other, and by up to 6 percent where each is pure noise (1024 x 1024); an update may
    be above its cap by as much.

    Args:
        model: any module that contains Hugging Face transformers.
        cap: largest ratio of an update.
        modules: glob pattern or patterns on qualified names of attention layers; None for all.
        iterations: of the power iteration, each step.
        trained: frozen weights are refused; else their updates are capped at the steps at which they train.

    Attributes:
        spare: called with a layer's name and a clause about it where its weights can be capped no more, which
            leaves the layer alone from then on; None: an error is raised.
        agree: given, once a step, the layers that cannot be capped here with their reasons, returns those that are
            to be left alone: where several processes step the same weights, those of any of them. It is called
            before anything is written.
        newest: ``(qualified layer name, "query" or "key")`` → what was done at the last step.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an argument is out of range, patterns match no layer, or weights that are no plain trainable
            whole parameters of their own.
    """

    @old_spellings(tau="cap")
    def __init__(
        self,
        model: nn.Module | ProjectionReader,
        cap: float,
        *,
        modules: str | Sequence[str] | None = None,
        iterations: int = 4,
        trained: bool = True,
    ) -> None:
        check_cap(cap, iterations)
        self._cap, self.iterations = cap, iterations
        reader = model if isinstance(model, ProjectionReader) else ProjectionReader(model)
        names = matching_layers(reader, modules)
        self.spare: Callable[[str, str], None] | None = None
        self.agree: Callable[[Mapping[str, str]], Mapping[str, str]] = dict
        self._doubts: dict[str, str] = {}
        self._reader = reader
        self._editors = head_scalers(reader, names, trained=trained)
        self._rows: dict[tuple[str, str], StoredRows] = {}
        for name, editor in self._editors.items():
            self._add(name, editor)
        self._before: dict[tuple[str, str], Tensor] = {}
        # Of the weights and of their updates.
        self._subspaces: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self.newest: dict[tuple[str, str], Capped] = {}

    def _add(self, name: str, editor: HeadScaler) -> None:
        if self._reader.is_sharded(name):
            raise ValueError(
                f"expected whole query and key weights, got those of {name}, which are sharded: use DDP, or "
                "leave the layer out with modules="
            )
        for stored in (editor.query, editor.key):
            _check_writable(name, stored)
        self._rows |= {(name, "query"): editor.query, (name, "key"): editor.key}

    @property
    def layers(self) -> list[str]:
        """The layers whose updates are capped."""
        return list(self._editors)

    @property
    def frozen(self) -> list[str]:
        """The layers whose query or key weights take no gradient now."""
        return [name for name, editor in self._editors.items() if editor.is_frozen]

    def leave_alone(self, name: str, reason: str) -> None:
        """Stops capping a layer; ``reason`` is a clause about it. Raises ValueError without ``spare``."""
        if self.spare is None:
            raise ValueError(
                f"expected query and key weights whose updates can be capped, got {name}: {reason}"
            )
        if self._editors.pop(name, None) is not None:
            for side in ("query", "key"):
                self._rows.pop((name, side), None)
                self._before.pop((name, side), None)
                self._subspaces.pop((name, side), None)
            self.spare(name, reason)

    def refresh(self) -> None:
        """Find the layers again after modules of the model were replaced.

        Note those that can no longer be capped.
        """
        found = True
        try:
            changed = self._reader.refresh()
        except ValueError as error:
            changed, found = True, False
            reason = str(error)
        for name, editor in list(self._editors.items()):
            try:
                if changed and not found:
                    raise ValueError(reason)
                if changed:
                    if name not in self._reader.layers:
                        gone = "it is no attention layer of the model any more"
                        raise ValueError(self._reader.unread.get(name, gone))
                    (editor,) = head_scalers(self._reader, [name], trained=False).values()
                    self._add(name, editor)
                    self._editors[name] = editor
                problem = editor.problem()
                if problem is not None:
                    raise ValueError(f"it has query and key weights {problem}")
            except ValueError as error:  # noqa: PERF203
                self._doubts.setdefault(name, str(error))

    def state_dict(self) -> dict[str, list[Tensor]]:
        """State of the estimates of σ₁, on the CPU: a resumed run caps like one without interruption."""
        return {
            f"{side}:{name}": [part.cpu() for part in parts]
            for (name, side), parts in self._subspaces.items()
        }

    def load_state_dict(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        """Restore it, for matrices of the same shape."""
        for (name, side), stored in self._rows.items():
            parts = state.get(f"{side}:{name}", ())
            weight = stored.weight
            columns = _matrix(stored).shape[1]
            if len(parts) == 2 and all(part.shape[0] == columns for part in parts):
                dtype = at_least_float32(weight).dtype
                of_weight, of_update = (part.to(weight.device, dtype) for part in parts)
                self._subspaces[name, side] = of_weight, of_update

    @torch.no_grad()
    def remember(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Keep the weights before a step.

        Args:
            parameters: those that the step is going to change; None for all.
        """
        wanted = None if parameters is None else {id(parameter) for parameter in parameters}
        if self.spare is not None:
            try:
                self.refresh()
            except Exception as error:
                for name in self._editors:
                    self._doubts.setdefault(name, f"it cannot be found again ({_text(error)})")
        for key, stored in self._rows.items():
            self._try(key, partial(self._remember_one, key, stored, wanted))

    def _remember_one(self, key: tuple[str, str], stored: StoredRows, wanted: set[int] | None) -> None:
        weight = stored.weight
        if weight.requires_grad and (wanted is None or id(weight) in wanted):
            self._before[key] = _rows(stored)

    def _try(self, key: tuple[str, str], action: Callable[[], None]) -> None:
        """Runs an action for a matrix, unless its layer has failed before; a failure is noted."""
        if key[0] in self._doubts:
            return
        try:
            action()
        except Exception as error:
            if self.spare is None:
                raise
            self._doubts[key[0]] = f"its update could not be capped ({_text(error)})"

    @torch.no_grad()
    def cap(self) -> dict[tuple[str, str], Capped]:
        """Scale the updates since :meth:`remember`, without synchronizing the device.

        Everything that may fail is done before :attr:`agree` is asked, and what is written after it.
        """
        self.newest = {}
        remembered, self._before = self._before, {}
        written: dict[tuple[str, str], Tensor] = {}
        subspaces: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

        def cap_one(key: tuple[str, str], stored: StoredRows) -> None:
            # The new rows replace the remembered ones: no more memory.
            self.newest[key], subspaces[key], written[key] = self._capped(key, stored, remembered.pop(key))

        for key in list(remembered):
            stored = self._rows.get(key)
            if stored is not None:  # not left alone since
                self._try(key, partial(cap_one, key, stored))
        doubts, self._doubts = self._doubts, {}
        for name, reason in self.agree(doubts).items():
            self.leave_alone(name, reason)
        self.newest = {key: capped for key, capped in self.newest.items() if key in self._rows}
        for key in self.newest:
            _put(self._rows[key], written[key])
            self._subspaces[key] = subspaces[key]
        return self.newest

    def _capped(
        self, key: tuple[str, str], stored: StoredRows, before: Tensor
    ) -> tuple[Capped, tuple[Tensor, Tensor], Tensor]:
        """The cap of one matrix, the subspaces of the next estimate, and the capped rows; nothing is changed."""
        after = _rows(stored)
        wide = at_least_float32(before)
        update = at_least_float32(after) - wide
        of_weight, of_update = self._subspaces.get(key) or _start(wide, update)
        size, of_weight = subspace_iteration(wide, of_weight, self.iterations)
        step, of_update = subspace_iteration(update, of_update, self.iterations)
        ratio = step / size
        # A step of 0, and one that is not finite, is left alone.
        is_large = (ratio > self._cap) & ratio.isfinite()
        factor = torch.where(is_large, self._cap / ratio, 1.0)
        capped = torch.where(is_large, wide + factor * update, at_least_float32(after))
        return Capped(factor, ratio), (of_weight, of_update), capped.to(after.dtype)

    def follow(
        self, optimizer: Optimizer, done: Callable[[dict[tuple[str, str], Capped]], None] | None = None
    ) -> Callable[[], None]:
        """Cap every step of an optimizer from now on.

        Args:
            optimizer: any; it steps the parameters themselves.
            done: called after each step with what was done.

        Returns:
            A function that ends it.
        """

        def before(optimizer: Optimizer, *args: Any) -> None:
            self.remember([parameter for group in optimizer.param_groups for parameter in group["params"]])

        def after(*args: Any) -> None:
            found = self.cap()
            if done is not None:
                done(found)

        handles = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end


@old_spellings(tau="cap")
def cap_updates(
    model: nn.Module,
    optimizer: Optimizer,
    cap: float,
    *,
    modules: str | Sequence[str] | None = None,
    iterations: int = 4,
) -> Callable[[], None]:
    """Cap every step of an optimizer from now on, see :class:`UpdateCapper` for arguments and errors.

    Returns:
        A function that ends it.
    """
    return UpdateCapper(model, cap, modules=modules, iterations=iterations).follow(optimizer)


def check_cap(cap: float, iterations: int) -> None:
    """Raises ValueError unless ``cap`` is finite and above 0 and there is at least one iteration."""
    if not math.isfinite(cap) or cap <= 0:
        raise ValueError(
            f"expected a finite cap above 0, got {cap}: 0.01 lets σ₁ change by a hundredth a step"
        )
    if iterations < 1:
        raise ValueError(f"expected at least 1 power iteration, got {iterations}")


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _start(weight: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """Subspaces of the first estimates."""
    start = starting_subspace(weight.shape[1], _VECTORS, device=weight.device, dtype=weight.dtype)
    return subspace_iteration(weight, start, 20)[1], subspace_iteration(update, start, 20)[1]


def _check_writable(name: str, stored: StoredRows) -> None:
    weight = stored.weight
    if _matrix(stored).untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        raise ValueError(
            f"expected contiguous query and key weights, got those of {name} in another memory format: call "
            ".contiguous() on them, or leave the layer out with modules="
        )


def _matrix(stored: StoredRows) -> Tensor:
    return stored.projection.as_rows(stored.weight.detach())


def _rows(stored: StoredRows) -> Tensor:
    """A copy of the rows, ``(rows, columns)``."""
    matrix = _matrix(stored)
    return matrix[stored.places.flatten().to(matrix.device)]


def _put(stored: StoredRows, rows: Tensor) -> None:
    matrix = _matrix(stored)
    matrix[stored.places.flatten().to(matrix.device)] = rows
