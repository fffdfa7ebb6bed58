"""A real training: what a step costs with the callbacks and without."""

import statistics
import time
import warnings
from typing import Any

import lightning as L
import torch
import transformers
from harness import Result, side_by_side, slope
from torch.utils.data import DataLoader
from turns import (
    BATCH,
    CADENCE,
    LENGTH,
    ClockedInputs,
    Job,
    by_hooks,
    in_turns,
    ratio,
    steps_of_both_kinds,
    uncertainty,
)

from lightning_qk import (
    AttentionMonitor,
    CollapseGuard,
    HiddenStateMonitor,
    LocAteR,
    PositionMonitor,
    QKSpectrumMonitor,
    SinkMonitor,
)

VOCABULARY = 10_000
# Figures come at every tenth measurement.
FIGURES = 10


def gpt2(layers: int = 6) -> transformers.PretrainedConfig:
    """A GPT-2-like language model, of 25 million parameters with 6 layers."""
    return transformers.GPT2Config(
        n_layer=layers, n_embd=512, n_head=8, n_positions=LENGTH, vocab_size=VOCABULARY
    )


def llama_1b() -> transformers.PretrainedConfig:
    """A Llama-like language model of about 1 billion parameters."""
    return transformers.LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        vocab_size=32_000,
        max_position_embeddings=4096,
    )


def monitors(every_n_steps: int) -> list[L.Callback]:
    arguments: dict[str, Any] = {"every_n_steps": every_n_steps, "report": False, "figures_every": 0}
    return [QKSpectrumMonitor(**arguments), AttentionMonitor(**arguments)]


def figures_seconds(layers: int = 6, heads: int = 8) -> float:
    """What drawing all heatmaps as PNG takes, as loggers that show pictures make the monitors do."""
    from lightning_qk.record.history import History
    from lightning_qk.report.figures import heatmap, to_png

    names = (*QKSpectrumMonitor.figure_statistics, *AttentionMonitor.figure_statistics)
    history = History([f"layer_{index:02d}" for index in range(layers)], [heads] * layers)
    history.append(0, {name: torch.rand(layers * heads) for name in names})
    (times,) = side_by_side([lambda: [to_png(heatmap(history, name)) for name in names]], repeats=5)
    return statistics.median(times)


def at_the_default_cadence(
    seconds: dict[str, list[float]],
    often: int,
    config: transformers.PretrainedConfig,
    hooks: dict[str, list[float]] | None = None,
) -> tuple[float, str]:
    """Mean cost of a step at the default cadence, from the steps of ``"default"``, every ``often``-th measured.

    Args:
        seconds: of every step of each variant.
        often: cadence of the steps.
        config: of the model.
        hooks: what the callbacks took of each step, where the device does not run ahead of them: ordinary steps
            are then judged by it.
    """
    measured, others = steps_of_both_kinds(len(seconds["none"]), often)
    due, paired = ratio(seconds, "default", measured), ratio(seconds, "default", others)
    ordinary = paired if hooks is None else by_hooks(seconds["default"], hooks["default"], others)
    step = statistics.median(seconds["none"])
    figures = figures_seconds(config.num_hidden_layers, config.num_attention_heads) / step
    value = ((CADENCE - 1) * ordinary + due + figures / FIGURES) / CADENCE
    error = uncertainty(seconds, "default", others)
    pairs = f"{paired:.4f} ± {error:.4f}"
    return value, (
        f"{CADENCE - 1} ordinary steps at "
        f"{pairs if hooks is None else f'{ordinary:.4f} by the time in hooks ({pairs} by pairs)'}, "
        f"one measured at {due:.4f}, figures at "
        f"every {FIGURES}th of these: {figures:.2f} steps; a step takes {step:.3g} s"
    )


def step_time(steps: int = 41) -> list[Result]:
    """A training step with the callbacks over one without, by turns in one process."""
    often, config = 5, gpt2()
    variants = {
        "none": [],
        "locater": [LocAteR(0.01)],
        "default": [LocAteR(0.01), *monitors(often)],
        "every": [LocAteR(0.01), *monitors(1)],
    }
    seconds, hooks = in_turns(variants, steps, config)
    value, detail = at_the_default_cadence(seconds, often, config, hooks)
    model = "GPT-2-like, 25 M parameters, n 512, batch 4"

    def pairs(name: str) -> str:
        return f"median of {steps - 1} pairs, ± {uncertainty(seconds, name):.4f}"

    measure = f"step time, three callbacks at the default cadence / none; {model}"
    return [
        Result("step_default", measure, value, 1.01, detail),
        Result(
            "step_every", "the same, monitors on every step", ratio(seconds, "every"), 1.15, pairs("every")
        ),
        Result(
            "step_locater",
            "LocAteR alone, every step / none",
            ratio(seconds, "locater"),
            1.02,
            pairs("locater"),
        ),
    ]


def locater_time(steps: int = 7) -> list[Result]:
    """A training step with LocAteR, over weights and over tokens, over one without, by turns in one process."""
    variants = {
        "none": [],
        "identity": [LocAteR(0.01)],
        "tokens": [ClockedInputs(0.01, sigma="tokens")],
        "limit": [ClockedInputs()],
    }
    seconds, hooks = in_turns(variants, steps, gpt2())
    return [
        Result(
            f"locater_{name}",
            f"LocAteR on every step, {title} / none; GPT-2-like, 25 M parameters, n 512, batch 4",
            by_hooks(seconds[name], hooks[name], range(steps - 1)),
            bar,
            f"by the time in hooks, median of {steps - 1}; by pairs {ratio(seconds, name):.3f}, 95 % "
            f"± {1.96 * uncertainty(seconds, name):.3f}",
        )
        for name, title, bar in (
            ("identity", "spectrum of the weights", 1.02),
            ("tokens", "token-aware spectrum, 512 tokens a step", 1.05),
            ("limit", "limit form, as by default", 1.05),
        )
    ]


def suite(every_n_steps: int) -> list[L.Callback]:
    """What there is beyond the three callbacks, save the probes."""
    arguments: dict[str, Any] = {"every_n_steps": every_n_steps, "report": False}
    return [
        HiddenStateMonitor(**arguments),
        SinkMonitor(figures_every=0, **arguments),
        PositionMonitor(figures_every=0, **arguments),
        CollapseGuard(every_n_steps=every_n_steps, checkpoint_every=0),
    ]


def suite_time(steps: int = 41) -> list[Result]:
    """A training step with the whole suite over one with the three callbacks, by turns in one process."""
    often = 5
    variants = {
        "default": [LocAteR(0.01), *monitors(often)],
        "suite": [LocAteR(0.01), *monitors(often), *suite(often)],
    }
    seconds, hooks = in_turns(variants, steps, gpt2())
    measured, others = steps_of_both_kinds(steps - 1, often)
    due = ratio(seconds, "suite", measured, "default")
    added = [own - base for own, base in zip(hooks["suite"], hooks["default"], strict=True)]
    ordinary = by_hooks(seconds["suite"], added, others)
    paired, error = (find(seconds, "suite", others, "default") for find in (ratio, uncertainty))
    return [
        Result(
            "step_suite",
            "step time, hidden states, sinks, positions and guard too, at the default cadence / three callbacks",
            ((CADENCE - 1) * ordinary + due) / CADENCE,
            1.01,
            f"{CADENCE - 1} ordinary steps at {ordinary:.5f} by the time in hooks ({paired:.4f} ± {error:.4f} by "
            f"pairs), one measured at {due:.4f}",
        )
    ]


def self_check(fits: int = 3, steps: int = 3) -> list[Result]:
    """The first step of a fit with the self-check over the same step without it, and over an ordinary one."""
    from lightning_qk.callbacks._self_check import SelfCheck

    length, batch, vocabulary = 64, 1, 1000
    config = transformers.GPT2Config(  # 12 layers, d_model 768
        n_positions=length, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0
    )
    data = torch.randint(0, vocabulary, (steps * batch, length))

    seconds: list[float] = []

    class Start(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            seconds.append(-time.perf_counter())

    class End(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seconds[-1] += time.perf_counter()

    def fit(*checks: SelfCheck) -> list[float]:
        L.seed_everything(0, verbose=False)
        seconds.clear()
        trainer = L.Trainer(
            max_steps=steps,
            callbacks=[Start(), *checks, End()],  # hooks are called in this order
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            accelerator="cpu",
        )
        trainer.fit(Job(config), DataLoader(data, batch_size=batch))
        return list(seconds)

    checked, plain = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit()  # warms up
        for _ in range(fits):
            check = SelfCheck()
            checked.append(fit(check))
            assert check.verdicts
            assert all(verdict.ok for verdict in check.verdicts.values())
            plain.append(fit())
    ordinary = [statistics.median(seconds[1:]) for seconds in checked]
    first = [with_it[0] / step for with_it, step in zip(checked, ordinary, strict=True)]
    pairs = [with_it[0] / without[0] for with_it, without in zip(checked, plain, strict=True)]
    added = [
        (with_it[0] - without[0]) / step
        for with_it, without, step in zip(checked, plain, ordinary, strict=True)
    ]
    return [
        Result(
            "self_check",
            "first step of a fit with the self-check / the same without it; GPT-2-small-like, 12 layers, "
            f"d 768, n {length}, batch {batch}",
            statistics.median(pairs),
            2.0,
            f"median of {fits} fits; the first step takes {statistics.median(first):.3g} ordinary steps of "
            f"{statistics.median(ordinary):.3g} s, of which the check is {statistics.median(added):.3g}, "
            "once a fit",
        )
    ]


def step_time_gpu(steps: int = 61) -> list[Result]:
    """The same on a GPU with a model of 1 B parameters."""
    often, config = 5, llama_1b()
    variants = {"none": [], "default": [LocAteR(0.01), *monitors(often)]}
    seconds, _ = in_turns(
        variants, steps, config, length=2048, accelerator="gpu", devices=1, precision="bf16-true"
    )
    value, detail = at_the_default_cadence(seconds, often, config)
    measure = (
        "step time, three callbacks at the default cadence / none; Llama-like, 1 B parameters, bf16, n 2048"
    )
    return [Result("step_gpu", measure, value, 1.01, detail)]


def step_times_gpu(steps: int = 21, **arguments: Any) -> list[Result]:
    """Every callback alone and together, on a GPU with a model of 1 B parameters, against the same without.

    Further arguments go to the trainers.
    """
    config = llama_1b()
    variants: dict[str, list[L.Callback]] = {
        "none": [],
        "LocAteR": [LocAteR(0.01)],
        "LocAteR of tokens": [LocAteR(0.01, sigma="tokens")],
        "monitors on every step": monitors(1),
    }
    bars = {"LocAteR": 1.01, "LocAteR of tokens": 1.02, "monitors on every step": 1.05}
    options = {"accelerator": "gpu", "devices": 1, "precision": "bf16-true", **arguments}
    seconds, _ = in_turns(variants, steps, config, length=2048, **options)
    detail = f"median of {steps - 1} pairs"
    return [
        Result(
            f"gpu_{name}",
            f"step time, {name} / none; Llama-like, 1 B parameters, bf16, n 2048",
            ratio(seconds, name),
            bar,
            f"{detail}, ± {uncertainty(seconds, name):.4f}",
        )
        for name, bar in bars.items()
    ]


def growth_in_layers() -> list[Result]:
    """How the cost of a measured step grows from 4 to 32 layers: what the monitors and the penalty add."""
    from lightning_qk.functional import attention_statistics
    from lightning_qk.heads.reader import head_projections
    from lightning_qk.metrics.spectrum import QKSpectrum
    from lightning_qk.regularizers.locater import locater_penalty

    counts = (4, 8, 16, 32)
    models = [Job(gpt2(layers)).network for layers in counts]
    query, key = torch.randn(2, BATCH, 8, LENGTH, 64).unbind()

    def spectrum(model: torch.nn.Module) -> None:
        with torch.no_grad():
            projections = head_projections(model)
            QKSpectrum({name: head.heads for name, head in projections.items()}).update(projections)

    def attention(layers: int) -> None:
        for _ in range(layers):
            attention_statistics(query, key, is_causal=True, rows=64)

    def penalty(model: torch.nn.Module) -> None:
        locater_penalty(model).backward()
        model.zero_grad()

    out = []
    for name, actions in (
        ("spectrum", [lambda model=model: spectrum(model) for model in models]),
        ("attention", [lambda layers=layers: attention(layers) for layers in counts]),
        ("penalty", [lambda model=model: penalty(model) for model in models]),
    ):
        seconds = [statistics.median(times) for times in side_by_side(actions, repeats=7)]
        out.append(
            Result(
                f"growth_layers_{name}",
                f"exponent of time in layers, {name}, 4 to 32 layers (1 is linear)",
                slope(counts, seconds),
                1.1,
                ", ".join(f"{n}: {s * 1e3:.3g} ms" for n, s in zip(counts, seconds, strict=True)),
            )
        )
    return out
