"""Whole runs of a small model, beginning and end included: what small steps show of the callbacks' overhead.

    python benchmarks/whole_run.py [--steps 200 --rounds 3] [--json docs/performance.json]

GPT-2-like, 5 M parameters, n 256, batch 4, CSV logger, one thread, processor's time. Each round trains without
callbacks, with three callbacks at the default cadence, with monitors on every step, and with LocAteR alone, one
step of each in turn. What a run of 200 steps takes is put together: its beginning and end, the first step, the
median of measured and of ordinary steps times their number. With fewer ``--steps`` the medians are of fewer.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from training import Job

from lightning_qk import AttentionMonitor, LocAteR, QKSpectrumMonitor
from lightning_qk.callbacks.callback import WRITES, Callback

LENGTH, BATCH, VOCABULARY = 256, 4, 4000
RUN, CADENCE = 200, 50
BARS = {"default": 1.03, "every": 1.15, "locater": 1.02}


def config() -> transformers.PretrainedConfig:
    """A GPT-2-like language model of five million parameters."""
    return transformers.GPT2Config(n_layer=6, n_embd=224, n_head=7, n_positions=LENGTH, vocab_size=VOCABULARY)


def variants(often: int) -> dict[str, list[L.Callback]]:
    """The callbacks of each run; reports and figures as they are by default."""

    def both(every: int) -> list[L.Callback]:
        return [QKSpectrumMonitor(every_n_steps=every), AttentionMonitor(every_n_steps=every)]

    return {
        "none": [],
        "default": [LocAteR(0.01), *both(often)],
        "every": [LocAteR(0.01), *both(1)],
        "locater": [LocAteR(0.01)],
    }


class Turn(Callback):
    """From the end of one step to the end of the next it is this training's turn; so it is before and after."""

    # A step ends when all callbacks have seen its end: monitors move behind callbacks of other classes.
    place = WRITES

    def __init__(self, locks: Sequence[threading.Semaphore], index: int) -> None:
        super().__init__()
        self.locks, self.index = locks, index
        self.seconds: list[float] = []  # the beginning with the first step, each step, the end
        self.spectrum: QKSpectrumMonitor | None = None

    def take(self) -> None:
        self.locks[self.index].acquire()
        self.start = time.process_time()

    def give(self) -> None:
        if self.spectrum is not None and self.spectrum._worker is not None:
            self.spectrum._worker.peek()  # what its thread does counts for this step
        self.seconds.append(time.process_time() - self.start)
        self.locks[(self.index + 1) % len(self.locks)].release()

    def on_train_batch_end(self, *args: Any) -> None:
        self.give()
        self.take()


def train(steps: int, often: int, seed: int) -> dict[str, list[float]]:
    """Seconds of each variant: the beginning and the first step, the others, the end."""
    chosen, failures = variants(often), []
    locks = [threading.Semaphore(int(index == 0)) for index in range(len(chosen))]
    turns = {name: Turn(locks, index) for index, name in enumerate(chosen)}
    torch.manual_seed(seed)
    data = torch.randint(0, VOCABULARY, (steps * BATCH, LENGTH))

    def fit(name: str, folder: str) -> None:
        turn = turns[name]
        turn.spectrum = next((one for one in chosen[name] if isinstance(one, QKSpectrumMonitor)), None)
        turn.take()
        try:
            job = Job(config())
            trainer = L.Trainer(
                max_steps=steps,
                callbacks=[*chosen[name], turn],
                logger=CSVLogger(folder),
                log_every_n_steps=often,
                accelerator="cpu",
                default_root_dir=folder,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
            )
            trainer.fit(job, DataLoader(data, batch_size=BATCH))
        except BaseException as error:
            failures.append(error)
        finally:
            turn.spectrum = None
            turn.give()

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=fit, args=(name, str(Path(folder, name)))) for name in chosen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return {name: turn.seconds for name, turn in turns.items()}


def whole(seconds: dict[str, list[float]], name: str, often: int) -> tuple[float, str]:
    """What 200 steps of a variant take over 200 without, and of what that consists."""

    def parts(own: str) -> tuple[float, list[float], float]:
        first, *steps, end = seconds[own]
        return first, steps, end

    base, plain, base_end = parts("none")
    first, steps, end = parts(name)
    # In pairs: each step over the one without callbacks that ran next to it.
    ratios = [one / other for one, other in zip(steps, plain, strict=True)]
    step = statistics.median(plain)
    measured = [ratio for place, ratio in enumerate(ratios, start=2) if name == "every" or place % often == 0]
    others = [] if name == "every" else [ratio for place, ratio in enumerate(ratios, 2) if place % often]
    if name == "locater":
        measured, others = [], ratios
    due = (RUN - 1 if name == "every" else 0 if name == "locater" else RUN // CADENCE) if measured else 0
    ordinary = statistics.median(others) if others else 0.0
    at = statistics.median(measured) if measured else 0.0
    total = first + end + step * (due * at + (RUN - 1 - due) * ordinary)
    value = total / (base + base_end + step * (RUN - 1))
    spread = statistics.quantiles(ratios, n=4)
    error = 1.96 * 1.2533 * (spread[2] - spread[0]) / 1.349 / len(ratios) ** 0.5
    known = [f"ordinary {ordinary:.4f}"] * bool(others) + [f"measured {at:.4f}"] * bool(measured)
    return value, (
        f"{', '.join(known)}, 95 % ± {error:.4f} of {len(ratios)} pairs of {step:.3g} s; begin and first step "
        f"+{first - base:.2f} s, end +{end - base_end:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=RUN)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    arguments = parser.parse_args()
    often = min(CADENCE, max(2, arguments.steps // 4))
    train(2, often, 0)  # warms up
    rounds = [train(arguments.steps, often, seed) for seed in range(arguments.rounds)]
    found = {}
    for name, bar in BARS.items():
        values = [whole(seconds, name, often) for seconds in rounds]
        value = statistics.median(value for value, _ in values)
        found[name] = {
            "value": value,
            "bar": bar,
            "rounds": [one for one, _ in values],
            "detail": values[0][1],
        }
        print(f"{name:<8} {value:.4f} (≤ {bar})  {values[0][1]}")
    if arguments.json:
        figures = json.loads(arguments.json.read_text())
        figures["whole_run"] = {"steps": arguments.steps, "results": found}
        arguments.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
