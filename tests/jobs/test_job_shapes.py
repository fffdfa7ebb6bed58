"""Jobs as others write them: training does not notice, numbers are those of dense algebra, no false word.

Every job runs twice: alone, keeping its own weights and softmaxes, and watched.
"""

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jobs_layers as layers
import jobs_zoo as zoo
import lightning as L
import models
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from rich.console import Console
from torch import Tensor, nn

from lightning_qk import AttentionMonitor, HiddenStateMonitor, QKSpectrumMonitor
from lightning_qk.record.health import print_health
from lightning_qk.record.history import RunRecord
from lightning_qk.record.verdicts import layer_health

STEPS, EVERY = 6, 2

FALSE_WORDS = (
    "non-finite",
    "not finite",
    "nan",
    "infinite",
    "saturated",
    "learning rate that is too high",
    "stopped measuring",
    "stopped logging",
    "not found",
)


def attention_layers(job: L.LightningModule) -> dict[str, nn.Module]:
    kinds: tuple[type, ...] = (layers.Kept, nn.MultiheadAttention)
    return {
        name: module
        for name, module in job.named_modules()
        if isinstance(module, kinds) or type(module).__name__ == "WhisperAttention"
    }


def reference_qk(module: nn.Module) -> tuple[Tensor, Tensor]:
    if isinstance(module, layers.Kept):
        return module.reference_qk()
    if isinstance(module, nn.MultiheadAttention):
        return layers.of_multihead(module)
    return layers.of_whisper(module)


class Notebook(L.Callback):
    """What a job that nobody watches did: weights after each step, softmaxes of each step's batch."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        self.softmaxes: dict[int, dict[str, list]] = {}
        self.hooks: list[Any] = []
        self.now: dict[str, list] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights[-1] = self.read(pl_module)
        self.stepped = 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        # Micro-batches of a step are one measurement.
        for name, module in attention_layers(pl_module).items():
            kept = self.now.setdefault(name, [])
            if isinstance(module, layers.Kept):
                module.kept = kept
            elif isinstance(module, nn.MultiheadAttention):
                self.hooks.append(layers.multihead_keeps(module, kept))
            else:
                self.hooks.append(layers.whisper_keeps(module, kept))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if trainer.global_step != self.stepped:
            self.stepped = trainer.global_step
            self.weights[step], self.softmaxes[step], self.now = self.read(pl_module), self.now, {}
        for module in attention_layers(pl_module).values():
            if isinstance(module, layers.Kept):
                module.kept = None
        while self.hooks:
            self.hooks.pop().remove()

    def read(self, pl_module: L.LightningModule) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            name: tuple(part.detach().clone() for part in reference_qk(module))
            for name, module in attention_layers(pl_module).items()
        }


class Scalars(DummyLogger):
    """Everything that a logger is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.sent.setdefault(step, {}).update(metrics)


@dataclass
class Run:
    job: zoo.Job
    notebook: Notebook = field(default_factory=Notebook)
    monitors: list = field(default_factory=list)
    logger: Scalars = field(default_factory=Scalars)
    trainer: Any = None
    words: str = ""
    rows: list = field(default_factory=list)
    rng: Tensor | None = None


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.5},
    "double": {"precision": "64-true"},
    "half": {"precision": "bf16-mixed"},
}
"""How a job is trained; half precision changes what logits are, so that only its losses are compared."""


def fit(name: str, variant: str, *, watched: bool) -> Run:
    shape = zoo.SHAPES[name]
    run = Run(zoo.build(shape))
    if watched:
        run.monitors = [
            QKSpectrumMonitor(per_head=True, report=False, figures_every=0),
            AttentionMonitor(per_head=True, report=False, figures_every=0),
            HiddenStateMonitor(report=False),
        ]
    arguments = {"val_check_interval": 3} if shape.validates else {"limit_val_batches": 0}
    arguments |= VARIANTS[variant]
    run.trainer = models.trainer(
        run.monitors if watched else [run.notebook],
        # Two optimizers that are stepped by hand count twice.
        max_steps=STEPS * (2 if name == "gan" else 1),
        log_every_n_steps=EVERY,
        logger=run.logger if watched else False,
        **arguments,
    )
    val = zoo.loader(shape, 4) if shape.validates else None
    torch.manual_seed(11)
    run.trainer.fit(run.job, zoo.loader(shape), val)
    run.rng = torch.get_rng_state()
    if watched:
        record = RunRecord()
        for monitor in run.monitors:
            monitor.contribute(record)
        out = io.StringIO()
        print_health(record, Console(file=out, width=200))
        run.rows = layer_health(record)
        run.words = "\n".join([out.getvalue(), *(note for monitor in run.monitors for note in monitor.notes)])
    return run


@pytest.fixture(scope="module")
def runs():
    """Job by job, alone and watched; each is made once, when it is first asked for."""
    made: dict[tuple[str, str], tuple[Run, Run]] = {}

    def get(name: str, variant: str) -> tuple[Run, Run]:
        if (name, variant) not in made:
            torch.set_num_threads(1)
            made[name, variant] = tuple(fit(name, variant, watched=watched) for watched in (False, True))
        return made[name, variant]

    return get


def jobs(
    names: Iterable[str], variants: Iterable[str], not_yet: dict[str, str] | None = None
) -> pytest.MarkDecorator:
    """Every job as it is, and, slowly, in the other ways to train; stepped by hand it has none.

    Args:
        names: of the jobs.
        variants: of training.
        not_yet: job → why it cannot pass yet.
    """
    reasons = {} if not_yet is None else not_yet
    cases = [
        pytest.param(
            name,
            variant,
            marks=[
                *([] if variant == "plain" else [pytest.mark.slow]),
                *([pytest.mark.xfail(strict=True, reason=reasons[name])] if name in reasons else []),
            ],
            id=name if variant == "plain" else f"{name}-{variant}",
        )
        for variant in variants
        for name in names
        if name != "gan" or variant in ("plain", "double")
    ]
    return pytest.mark.parametrize(("name", "variant"), cases)


every_job = jobs(zoo.SHAPES, VARIANTS)
exact = [variant for variant in VARIANTS if variant != "half"]
same_numbers = jobs(zoo.SHAPES, exact)


@every_job
def test_training_does_not_notice(name, variant, runs):
    alone, watched = runs(name, variant)
    assert len(alone.job.losses) >= STEPS
    assert all(torch.equal(a, b) for a, b in zip(alone.job.losses, watched.job.losses, strict=True))
    for (key, a), (_, b) in zip(
        alone.job.state_dict().items(), watched.job.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), key
    assert torch.equal(alone.rng, watched.rng)
    assert all(loss.isfinite() for loss in alone.job.losses)


def dense_spectrum(query: Tensor, key: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Statistic → value and the size of what is added up for it, per head, of W_QK as a whole matrix."""
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    whole = query.mT @ key
    n = whole.shape[-1]
    frobenius = whole.square().sum((-2, -1))
    singular = torch.linalg.matrix_norm(whole, 2)
    found = {"frobenius_sq": (frobenius, frobenius), "singular_max": (singular, singular)}
    if whole.shape[-2] != n:
        return found
    trace = whole.diagonal(dim1=-2, dim2=-1).sum(-1)
    size = (query * key).abs().sum((-2, -1))
    squared = (whole * whole.mT).sum((-2, -1))
    symmetric = torch.linalg.eigvalsh((whole + whole.mT) / 2)
    values = torch.linalg.eigvals(whole)
    mean = values.mean(-1).real
    return found | {
        "trace": (trace, size),
        "trace_sq": (squared, frobenius),
        "eig_mean": (mean, size / n),
        "eig_var": ((values - mean[:, None]).square().mean(-1).real, frobenius / n),
        "sym_var": (symmetric.var(-1, correction=0), frobenius / n),
        "asymmetry": (((whole - whole.mT) / 2).square().sum((-2, -1)) / frobenius, torch.ones_like(trace)),
        # Of a matrix that is not normal, eigenvalues move more than its entries.
        "spectral_radius": (values.abs().amax(-1), singular),
    }


def layer_values(monitor: Any, statistic: str, label: str, index: int) -> Tensor:
    history = monitor.history
    return history.split(history.values[statistic][index])[history.layers.index(label)]


@jobs(zoo.SHAPES, exact)
def test_spectra_are_those_of_the_dense_matrix(name, variant, runs):
    alone, watched = runs(name, variant)
    spectrum = watched.monitors[0]
    assert spectrum.history is not None, spectrum.notes
    names = list(attention_layers(alone.job))
    assert len(names) == zoo.SHAPES[name].attention
    crossing = 0
    for layer in names:
        # All of these are W x + b by their own forward: none may be left out.
        assert layer in spectrum.labels, spectrum.notes
        label = spectrum.labels[layer]
        for index, step in enumerate(spectrum.history.steps):
            query, key = alone.notebook.weights[step][layer]
            wanted = dense_spectrum(query, key)
            found = {
                statistic: layer_values(spectrum, statistic, label, index).double() for statistic in wanted
            }
            is_cross = bool(found.get("trace", torch.full((1,), torch.nan)).isnan().all())
            for statistic, (value, size) in wanted.items():
                # Largest singular values are those of cross-attention alone, all else but the norm is not.
                if is_cross != (statistic == "singular_max") and found[statistic].isnan().all():
                    continue
                error = (found[statistic] - value).abs()
                assert (error <= 1e-5 * torch.maximum(value.abs(), size)).all(), (
                    f"{layer} {statistic} at step {step}: logged {found[statistic]}, dense {value}"
                )
        crossing += is_cross
    assert crossing == zoo.SHAPES[name].cross
    assert [step for step in spectrum.history.steps if step >= 0] == [1, 3, 5]


def dense_attention(kept: list, self_attention: bool) -> dict[str, Tensor]:
    """Means over the rows that count of all calls: those that see a key and are seen."""
    totals: dict[str, Tensor] = {}
    count = torch.zeros((), dtype=torch.double)
    for probabilities, visible in kept:
        b, _, n, m = probabilities.shape
        shown = torch.ones(b, 1, n, m, dtype=torch.bool)
        if visible is not None:
            shown = shown & visible
        keep = shown.any(-1).any(1)
        if self_attention and n == m:
            keep = keep & shown.any(2).any(1)
        weight = keep[:, None].double()
        entropy = torch.special.entr(probabilities).sum(-1)
        seen = shown.sum(-1).expand(entropy.shape)
        found = {
            "entropy": entropy,
            "max_prob": probabilities.amax(-1),
            "participation": 1 / probabilities.square().sum(-1),
        }
        for statistic, rows in found.items():
            totals[statistic] = totals.get(statistic, 0) + (rows * weight).sum((0, 2))
        several = weight * (seen > 1)
        normalized = torch.where(seen > 1, entropy / seen.double().clamp_min(2).log(), 0.0)
        totals["normalized"] = totals.get("normalized", 0) + (normalized * several).sum((0, 2))
        totals["several"] = totals.get("several", 0) + several.sum((0, 2))
        count = count + weight.sum()
    several, normalized = totals.pop("several"), totals.pop("normalized")
    return {name: value / count for name, value in totals.items()} | {
        "entropy_normalized": normalized / several
    }


@same_numbers
def test_attention_is_that_of_the_dense_softmax(name, variant, runs):
    alone, watched = runs(name, variant)
    attention = watched.monitors[1]
    assert attention.history is not None, attention.notes
    assert attention.history.steps == [1, 3, 5]
    cross = {layer for layer, _ in cross_layers(name, alone)}
    for layer in attention_layers(alone.job):
        assert layer in attention.labels, attention.notes
        label = attention.labels[layer]
        for index, step in enumerate(attention.history.steps):
            kept = alone.notebook.softmaxes[step][layer]
            if not kept:  # skipped in this step: no value, and no word of a fault
                assert layer_values(attention, "entropy", label, index).isnan().all()
                continue
            for statistic, value in dense_attention(kept, layer not in cross).items():
                found = layer_values(attention, statistic, label, index).double()
                torch.testing.assert_close(
                    found,
                    value,
                    rtol=1e-5,
                    atol=1e-6,
                    msg=partial("{} {} at step {}: {}".format, layer, statistic, step),
                )


def cross_layers(name: str, run: Run) -> list[tuple[str, nn.Module]]:
    parts = {"detr": "multihead_attn", "whisper": "encoder_attn", "annotated": "src.", "perceiver": "cross."}
    if name not in parts:
        return []
    return [(layer, module) for layer, module in attention_layers(run.job).items() if parts[name] in layer]


@jobs(zoo.SHAPES, VARIANTS)
def test_loggers_get_the_same_numbers(name, variant, runs):
    _, watched = runs(name, variant)
    checked = 0
    for monitor, prefix, statistic in zip(
        watched.monitors, ("qk", "attn"), ("sym_var", "entropy"), strict=False
    ):
        for index, step in enumerate(monitor.history.steps):
            sent = {} if step < 0 else watched.logger.sent[step]
            for label in monitor.history.layers if step >= 0 else ():
                for head, value in enumerate(layer_values(monitor, statistic, label, index).tolist()):
                    key = f"{prefix}/{label}/head_{head:02d}/{statistic}"
                    assert (key in sent) == (value == value), key
                    if key in sent:
                        assert sent[key] == pytest.approx(value, rel=1e-6)
                        checked += 1
    assert checked >= 4 * len(attention_layers(watched.job))


@every_job
def test_no_false_word_in_table_and_notes(name, variant, runs):
    alone, watched = runs(name, variant)
    words = watched.words.lower()
    for word in FALSE_WORDS:
        assert re.search(rf"\b{word}\b", words) is None, watched.words
    last = alone.notebook.softmaxes[5]
    ever = {layer for kept in alone.notebook.softmaxes.values() for layer, calls in kept.items() if calls}
    cross = {layer for layer, _ in cross_layers(name, alone)}
    by_label = {row.label: row for row in watched.rows}
    assert len(by_label) == zoo.SHAPES[name].attention, watched.words
    for layer, label in watched.monitors[1].labels.items():
        row = by_label[label]
        if not last[layer]:
            assert row.verdict in ("ok", "fresh", "no data", "idle", "not run"), watched.words
            continue
        dense = dense_attention(last[layer], layer not in cross)
        entropy = float(dense["entropy_normalized"].mean())
        # In half precision the oracle's own logits are rounded.
        assert row.entropy_normalized == pytest.approx(entropy, rel=1e-2 if variant == "half" else 1e-4)
        assert (row.verdict == "uniform") == (entropy > 0.98), watched.words
        assert row.verdict in ("ok", "sink", "uniform", "fresh"), watched.words
    if ever == set(attention_layers(alone.job)) and name != "layerdrop":
        assert "no attention call" not in words, watched.words
        assert "no hidden states" not in words or name in ("informer", "annotated", "perceiver"), (
            watched.words
        )


@jobs([name for name, shape in zoo.SHAPES.items() if shape.idle], ["plain"])
def test_means_are_over_what_is_trained(name, variant, runs):
    _, watched = runs(name, variant)
    idle = zoo.SHAPES[name].idle
    for monitor, prefix, statistic in zip(
        watched.monitors, ("qk", "attn"), ("sym_var", "entropy"), strict=False
    ):
        trained = torch.cat(
            [
                layer_values(monitor, statistic, label, -1)
                for layer, label in monitor.labels.items()
                if idle not in layer
            ]
        )
        mean = watched.trainer.callback_metrics[f"{prefix}/{statistic}/mean"]
        torch.testing.assert_close(float(mean), float(trained.mean()), rtol=1e-5, atol=0)


def test_layers_are_left_out_at_random_indeed(runs):
    alone, watched = runs("layerdrop", "plain")
    assert alone.job.ran == watched.job.ran
    measured = [alone.job.ran[step] for step in (1, 3, 5)]
    assert any(not all(ran) for ran in measured)
    assert any(any(ran) for ran in measured)


def test_generation_in_validation_is_not_training(runs):
    alone, watched = runs("whisper", "plain")
    assert len(alone.job.said) == len(watched.job.said) > 1
    assert all(torch.equal(a, b) for a, b in zip(alone.job.said, watched.job.said, strict=True))
