"""The training runs of the benchmark: what each is, as data. Whether it fails is decided by its loss alone."""

from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

EVERY = 4
"""Steps between measurements."""

_TEXT = {"block_size": 64, "batch_size": 8, "max_characters": 400_000}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "task": "causal_lm",
        "model": {
            "model_type": "gpt2",
            "n_embd": 64,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "depth": "n_layer",
        "data": _TEXT,
    },
    # The deep and narrow model of MSign (arXiv 2602.01734), nanoGPT of 5 M parameters.
    "deep": {
        "task": "causal_lm",
        "model": {
            "model_type": "gpt2",
            "n_embd": 48,
            "n_head": 6,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "depth": "n_layer",
        "data": {**_TEXT, "block_size": 32},
    },
    "llama": {
        "task": "causal_lm",
        "model": {
            "model_type": "llama",
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "max_position_embeddings": 64,
        },
        "depth": "num_hidden_layers",
        "data": _TEXT,
    },
    # Norms after each block. With BERT's own standard deviation of 0.02 it learns nothing beyond the frequencies
    # of bytes in a few hundred steps, healthy or not.
    "bert": {
        "task": "masked_lm",
        "model": {
            "model_type": "bert",
            "hidden_size": 64,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.1,
        },
        "depth": "num_hidden_layers",
        "data": {**_TEXT, "batch_size": 16},
    },
    # A fifth of the labels is drawn at random, for all runs of the family: without, the loss goes to nothing,
    # and a tenth of nothing is lost in noise.
    "vit": {
        "task": "image_classification",
        "model": {
            "model_type": "vit",
            "image_size": 8,
            "patch_size": 2,
            "num_channels": 1,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "num_labels": 10,
            "initializer_range": 0.1,
        },
        "depth": "num_hidden_layers",
        "data": {"batch_size": 32, "wrong_labels": 0.2},
    },
}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: of the run.
        family: one of :data:`FAMILIES`.
        seed: of weights and the order of the batches.
        steps: optimizer steps.
        layers: depth of the model.
        lr: peak learning rate of AdamW.
        warmup: steps over which it rises from zero; it is constant then.
        batch_size: another than the family's.
        clip: bound of the gradient's norm; None for no bound.
        betas: of AdamW.
        qk_scale: factor of query and key weights at the start.
        query_scale: factor of query weights at the start, besides.
        init_scale: factor of all matrices inside the layers at the start.
        skip: what the skip connection around each layer passes on.
        rounding: ``"fp16"``: products of queries and keys in half precision before they are scaled, which overflow
            above 65 504; ``"bf16_weights"``: weights are rounded to bfloat16 after each step.
        garbage: steps (from, to) whose inputs are drawn at random.
        wrong_inputs: share of inputs that are replaced by random ones, throughout.
        ramp: (from, to, factor): between these steps the learning rate grows to so many times what it was.
        resume: step at which the run is ended and resumed from its checkpoint.
        fresh_optimizer: the resumed run starts with an optimizer that remembers nothing.
        every: steps between measurements.
        reference: one of the healthy runs that define what is healthy in the family.
        reports: of the half that figures are reported on; nothing is chosen on it.
    """

    name: str
    family: str
    seed: int = 1
    steps: int = 300
    layers: int = 4
    lr: float = 3e-3
    warmup: int = 30
    batch_size: int | None = None
    clip: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    qk_scale: float = 1.0
    query_scale: float = 1.0
    init_scale: float = 1.0
    skip: float = 1.0
    rounding: str | None = None
    garbage: tuple[int, int] | None = None
    wrong_inputs: float = 0.0
    ramp: tuple[int, int, float] | None = None
    resume: int | None = None
    fresh_optimizer: bool = False
    every: int = EVERY
    reference: bool = False
    reports: bool = False

    def key(self) -> dict[str, Any]:
        """All that its numbers depend on, as plain JSON."""
        own = asdict(self)
        del own["reports"]
        return {**own, "family": {"name": self.family, **FAMILIES[self.family]}}


def _references() -> list[Run]:
    seeds = (11, 12, 13)
    out = [
        Run(f"{family}-reference-{seed}", family, seed, reference=True)
        for family in FAMILIES
        for seed in (seeds if family != "deep" else seeds[:1])
    ]
    own = {"bert": _bert, "deep": _deep}
    return [own.get(run.family, replace)(run) for run in out]


def _bert(run: Run, layers: int = 2) -> Run:
    """Predicting masked bytes takes longer to learn, and fewer layers learn it sooner."""
    return replace(run, steps=400, layers=layers)


def _deep(run: Run, peak: float = 1.0) -> Run:
    """MSign's recipe, reduced: 8 of 24 layers and 1,000 of 30,000 steps.

    As there, queries start from zero and all else four times as large. The rate that fails after 20,000 steps does
    nothing in 1,000; so here it rises slowly, to ``peak`` times what it was.
    """
    ramp = (200, 1000, peak) if peak != 1 else None
    return replace(
        run,
        steps=1000,
        layers=8,
        lr=4e-3,
        warmup=100,
        betas=(0.9, 0.95),
        init_scale=4,
        query_scale=0,
        ramp=ramp,
        every=8,
    )


# What is meant to fail, the causes in turn; whether it does is decided by the loss.
_DRIVEN = [
    Run("gpt2-rate", "gpt2", 1, lr=3e-2, warmup=0),
    Run("gpt2-rising-rate", "gpt2", 2, lr=1e-1, warmup=300),
    Run("gpt2-large-qk", "gpt2", 3, lr=2e-2, warmup=0, qk_scale=8),
    Run("gpt2-fp16", "gpt2", 4, lr=1e-1, warmup=300, qk_scale=8, rounding="fp16"),
    Run("gpt2-deep", "gpt2", 5, layers=8, skip=0.5),
    Run("llama-deep", "llama", 1, layers=8, skip=0.5),
    Run("llama-fp16", "llama", 2, lr=1e-1, warmup=300, qk_scale=8, rounding="fp16"),
    Run("llama-large-qk", "llama", 3, lr=3e-2, warmup=0, qk_scale=16),
    Run("llama-rising-rate", "llama", 4, lr=1e-1, warmup=300),
    Run("llama-late-rise", "llama", 6, ramp=(50, 250, 20)),
    _bert(Run("bert-rate", "bert", 1, lr=3e-2, warmup=0)),
    _bert(Run("bert-rising-rate", "bert", 2, lr=1e-1, warmup=400)),
    _bert(Run("bert-deep", "bert", 3), layers=8),
    _bert(Run("bert-large-qk", "bert", 4, lr=1e-2, warmup=0, qk_scale=8)),
    Run("vit-rate", "vit", 1, lr=3e-2, warmup=0),
    Run("vit-rising-rate", "vit", 2, lr=1e-1, warmup=300),
    Run("vit-late-rise", "vit", 3, ramp=(100, 250, 30)),
    Run("vit-large-qk", "vit", 4, lr=2e-2, warmup=0, qk_scale=8),
    Run("vit-deep", "vit", 5, layers=8, skip=0.3),
    Run("vit-fp16", "vit", 6, lr=1e-1, warmup=300, qk_scale=8, rounding="fp16"),
]

# What is meant to train well, though not smoothly.
_ROUGH = [
    Run("gpt2-high-rate", "gpt2", 21, lr=4e-3),
    Run("gpt2-garbage", "gpt2", 22, garbage=(120, 121)),
    Run("gpt2-sharp-start", "gpt2", 23, qk_scale=8),
    Run("gpt2-fresh-optimizer", "gpt2", 24, resume=150, fresh_optimizer=True),
    Run("gpt2-no-warmup", "gpt2", 26, lr=2e-3, warmup=0),
    Run("llama-high-rate", "llama", 21, lr=4e-3),
    Run("llama-bf16-weights", "llama", 22, rounding="bf16_weights"),
    Run("llama-small-batches", "llama", 23, lr=2e-3, batch_size=5),
    Run("llama-resume", "llama", 24, resume=130),
    Run("llama-garbage", "llama", 26, garbage=(60, 61)),
    _bert(Run("bert-no-warmup", "bert", 21, warmup=0)),
    _bert(Run("bert-garbage", "bert", 22, garbage=(180, 188))),
    _bert(Run("bert-small-batches", "bert", 24, batch_size=10)),
    Run("vit-high-rate", "vit", 21, lr=5e-3),
    Run("vit-noise", "vit", 26, wrong_inputs=0.02),
    Run("vit-garbage", "vit", 23, garbage=(100, 103)),
    Run("vit-fresh-optimizer", "vit", 24, resume=150, fresh_optimizer=True),
    Run("vit-sharp-start", "vit", 27, qk_scale=2),
]


CHOOSING = 100
"""Added to the seeds of the half to choose on: those above were looked at while detectors were built."""
SPENT = (100, 200, 300)
"""Added to the seeds of the other half in draws that reported once. What they showed was used since, so that they
belong to what was chosen on."""
REPORTING = 400
"""Added to the seeds of the half that reports: trained for the first time when nothing was left to choose."""


def _drawn(runs: list[Run]) -> list[Run]:
    chosen = [replace(run, seed=run.seed + CHOOSING) for run in runs[::2]]
    chosen += [replace(run, seed=run.seed + offset) for offset in SPENT for run in runs[1::2]]
    return chosen + [replace(run, seed=run.seed + REPORTING, reports=True) for run in runs[1::2]]


REFERENCES = _references()
DRIVEN = _drawn(_DRIVEN)
ROUGH = _drawn(_ROUGH)


# Every one of these was looked at while rules of alarms were made, so that none of them reports.
_ROUGH_SEEN = (
    *("vit-fresh-optimizer", "vit-noise", "vit-garbage", "vit-high-rate", "llama-resume", "vit-sharp-start"),
    *("llama-small-batches", "llama-bf16-weights", "gpt2-fresh-optimizer", "llama-high-rate"),
    *("gpt2-high-rate", "gpt2-garbage"),
)
_DRAWN = {run.name: run for run in ROUGH}
CHOSEN_ON = [
    replace(run, reports=False)
    for run in (*(run for run in DRIVEN if run.reports), *(_DRAWN[name] for name in _ROUGH_SEEN))
]
"""Runs on which alarms of single statistics have their rule and threshold chosen."""


def _fresh(offset: int) -> list[Run]:
    """Driven and rough recipes in turn, families mixed, so that a part of them is one of all."""
    mixed = [sorted(kind, key=lambda run: (run.seed % 20, run.family)) for kind in (_DRIVEN, _ROUGH)]
    pairs = zip_longest(*mixed)
    return [replace(one, seed=one.seed + offset, reports=True) for two in pairs for one in two if one]


FRESH = [*_fresh(500), *_fresh(600)]
"""Runs on which they are reported: two seeds of every recipe that no one had looked at when all rules stood."""

SLOW = [
    run
    for seed in (3, 4, 5)
    for run in (
        _deep(Run("deep-slow", "deep", seed, reports=True), peak=20),
        _deep(Run("deep-healthy", "deep", seed + 20, reports=True)),
    )
]
"""A failure that takes its time, and the same without its cause; nothing is chosen on it."""
