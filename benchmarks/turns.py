"""Trainings in one process that take a step in turn, so that all of them see the same machine."""

import statistics
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import lightning as L
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_qk import LocAteR, QKSpectrumMonitor

LENGTH, BATCH = 512, 4
# The default of a Lightning Trainer, and of the monitors.
CADENCE = 50


class Job(L.LightningModule):
    """An ordinary language model's training."""

    def __init__(self, config: transformers.PretrainedConfig) -> None:
        super().__init__()
        self.network = transformers.AutoModelForCausalLM.from_config(config)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.network(input_ids=batch, labels=batch).loss
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


class Turns:
    """Several trainings in one process, one step each in turn."""

    def __init__(self, count: int) -> None:
        self.locks = [threading.Semaphore(int(index == 0)) for index in range(count)]
        self.seconds: list[list[float]] = [[] for _ in range(count)]


class HookClock:
    """The time that callbacks spend in their own hooks, step by step.

    A step's whole time is known to about a hundredth on a shared machine; what an ordinary step costs is less.
    """

    def __init__(self, callbacks: Sequence[L.Callback]) -> None:
        self.steps: list[float] = []
        self._now, self._depth = 0.0, 0
        for callback in callbacks:
            for name in dir(L.Callback):
                if name.startswith("on_"):
                    setattr(callback, name, self.timed(getattr(callback, name)))

    def timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = harness.clock()
            self._depth += 1
            try:
                return hook(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:  # the guard calls hooks of monitors of its own
                    self._now += harness.clock() - start

        return timed

    def end_step(self) -> None:
        self.steps.append(self._now)
        self._now = 0.0


class Turn(L.Callback):
    """First of a trainer's callbacks: from one batch's start to the next it is this trainer's turn."""

    def __init__(
        self, turns: Turns, index: int, spectrum: QKSpectrumMonitor | None, clock: HookClock
    ) -> None:
        self.turns, self.index, self.spectrum, self.clock = turns, index, spectrum, clock
        self.start: float | None = None
        self.on_gpu = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.on_gpu = pl_module.device.type == "cuda"
        self.end_turn()
        self.turns.locks[self.index].acquire()
        self.start = harness.clock()

    def on_train_end(self, *args: Any) -> None:
        self.end_turn()

    def end_turn(self) -> None:
        if self.start is None:
            return
        if self.on_gpu:
            torch.cuda.synchronize()
        elif self.spectrum is not None:
            # The worker's thread shares the cores: its work counts for this step and not for another's.
            self.spectrum._worker.peek()
        self.turns.seconds[self.index].append(harness.clock() - self.start)
        self.clock.end_step()
        self.start = None
        self.turns.locks[(self.index + 1) % len(self.turns.locks)].release()


class ClockedInputs(LocAteR):
    """LocAteR over tokens, of which what samples them in the forward pass counts as a hook."""

    clock: HookClock

    def _listen(self, *args: Any) -> None:
        super()._listen(*args)
        assert self._inputs is not None
        capture = self._inputs._inputs._capture
        capture.receive = self.clock.timed(capture.receive)  # type: ignore[method-assign]


def in_turns(
    variants: dict[str, list[L.Callback]],
    steps: int,
    config: transformers.PretrainedConfig,
    *,
    length: int = LENGTH,
    **arguments: Any,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every step of each variant, from the second on, and how many of them its callbacks took.

    Further arguments go to the trainers.
    """
    turns, failures = Turns(len(variants)), []
    clocks = {name: HookClock(callbacks) for name, callbacks in variants.items()}
    for name, callbacks in variants.items():
        for callback in callbacks:
            if isinstance(callback, ClockedInputs):
                callback.clock = clocks[name]
    data = torch.randint(0, config.vocab_size, (steps * BATCH, length))

    def fit(index: int, clock: HookClock, callbacks: list[L.Callback], folder: str) -> None:
        spectrum = next((c for c in callbacks if isinstance(c, QKSpectrumMonitor)), None)
        turn = Turn(turns, index, spectrum, clock)
        try:
            L.seed_everything(index, verbose=False)
            trainer = L.Trainer(
                max_steps=steps,
                callbacks=[turn, *callbacks],
                logger=CSVLogger(folder),
                log_every_n_steps=CADENCE,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                **{"accelerator": "cpu", **arguments},
            )
            trainer.fit(Job(config), DataLoader(data, batch_size=BATCH))
        except BaseException as error:
            failures.append(error)
            turn.end_turn()

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [
            threading.Thread(target=fit, args=(index, clocks[name], callbacks, str(Path(folder, name))))
            for index, (name, callbacks) in enumerate(variants.items())
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    seconds = {name: own[1:] for name, own in zip(variants, turns.seconds, strict=True)}
    return seconds, {name: clock.steps[1:] for name, clock in clocks.items()}


def ratio(
    seconds: dict[str, list[float]], name: str, chosen: Sequence[int] | None = None, base: str = "none"
) -> float:
    """Median over steps of a variant's time over another's, by default that without callbacks."""
    indices = range(len(seconds[base])) if chosen is None else chosen
    return statistics.median(seconds[name][index] / seconds[base][index] for index in indices)


def uncertainty(
    seconds: dict[str, list[float]], name: str, chosen: Sequence[int] | None = None, base: str = "none"
) -> float:
    """Standard error of :func:`ratio`, from the quartiles of a normal distribution and its median's efficiency."""
    indices = range(len(seconds[base])) if chosen is None else chosen
    low, _, high = statistics.quantiles((seconds[name][i] / seconds[base][i] for i in indices), n=4)
    return 1.2533 * (high - low) / 1.349 / len(indices) ** 0.5


def by_hooks(seconds: Sequence[float], hooks: Sequence[float], chosen: Sequence[int]) -> float:
    """Median over steps of the whole time over what it would be without the time in the hooks."""
    return statistics.median(seconds[index] / (seconds[index] - hooks[index]) for index in chosen)


def steps_of_both_kinds(count: int, often: int) -> tuple[Sequence[int], Sequence[int]]:
    """Indices of measured and of ordinary steps, of which every ``often``-th is measured."""
    measured = range(often - 2, count, often)  # the first step was left out: index 0 is step 1
    return measured, [index for index in range(count) if index not in measured]
