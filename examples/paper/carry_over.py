"""Does one coefficient of LocAteR carry over? Chosen in the one-layer setting, then used unchanged in others.

    python examples/paper/carry_over.py [--quick] [--jobs 2]

Plain and token-aware form with a coefficient, and the latter with a share of the gradient's norm. Each run's
numbers are kept in ``OUT/.cache/locater`` under its configuration: an interrupted call goes on.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common import Clock, Options, figure, options, save, write
from locater import cache_key, cached_train, shown_interval
from train import SETTINGS, configuration

NAME = "carry_over"
TUNING_SEED = 100
SEEDS = 3
CHOSEN_IN = "paper"
"""The setting that coefficients are chosen in; the others only use them."""

SWEEP: dict[str, list[Any]] = {
    "tokens": [0.3, 3.0, 30.0, 300.0],
    "variance": [0.01, 0.1, 1.0, 10.0],
}
SHARES = ["10%", "100%"]
"""Shares of the gradient's norm on W_q and W_k, token-aware."""

RATES: dict[str, list[float]] = {
    "gpt_pre": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
    "llama": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
    "gpt_post": [5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2],
}
"""Learning rates of the sweep for stability."""

_SHORT: dict[str, dict[str, Any]] = {
    "paper": {"steps": 200},
    "gpt_pre": {"steps": 100},
    "gpt_post": {"steps": 100},
    "llama": {"steps": 100},
    "vit": {"steps": 150},
    "sst2": {"steps": 40},
}
TITLES = {
    "paper": "1 layer, 1 head, post-LN (chosen here)",
    "gpt_pre": "GPT-2-like, 4 layers, pre-LN",
    "gpt_post": "OPT-like, 4 layers, post-LN",
    "llama": "Llama-like, 4 layers, rotary, grouped",
    "vit": "ViT on digits, 4 layers",
    "sst2": "MiniLM, fine-tuned on SST-2",
}
LABELS = {"tokens": "token-aware", "variance": "plain", "share": "token-aware, share of the gradient"}

Key = tuple[str, Any]
_BASE: Key = ("baseline", None)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the cache, in the order of worth, and write results and figure after each part."""
    opts = options(__doc__, argv)
    clock = Clock()
    results = Results(opts)
    for key in sweep(opts):
        results.run(CHOSEN_IN, key, TUNING_SEED)
    chosen = results.chosen()
    settings = [name for name in results.settings if name != CHOSEN_IN]
    for seed in range(opts.pick(SEEDS, 1)):
        for setting in results.settings:
            for key in [_BASE, *chosen.values()]:
                results.run(setting, key, seed)
        publish(results, chosen, clock)
    for setting in settings:
        for key in sweep(opts):
            results.run(setting, key, TUNING_SEED)
        publish(results, chosen, clock)
    for setting, rate, key in rates(opts, chosen):
        results.run(setting, key, TUNING_SEED, rate)
    publish(results, chosen, clock)


def sweep(opts: Options) -> list[Key]:
    """Everything that is tried on the tuning seed."""
    found = [(method, value) for method, values in SWEEP.items() for value in opts.pick(values, values[2:3])]
    return [_BASE, *found, *(("share", value) for value in opts.pick(SHARES, SHARES[1:2]))]


def rates(opts: Options, chosen: Mapping[str, Key]) -> Iterator[tuple[str, float, Key]]:
    """The sweep of learning rates: setting, rate, method."""
    for setting, values in opts.pick(RATES, {}).items():
        for rate in values:
            for key in (_BASE, chosen["tokens"], chosen["share"]):
                yield setting, rate, key


class Results:
    """Runs by setting, method, seed and learning rate.

    Attributes:
        settings: names, the one that coefficients are chosen in first.
    """

    def __init__(self, opts: Options) -> None:
        self.opts = opts
        self.settings = opts.pick(list(_SHORT), [CHOSEN_IN, "vit"])
        self._runs: dict[tuple[str, Key, int, float | None], dict[str, Any]] = {}

    def run(self, setting: str, key: Key, seed: int, rate: float | None = None) -> None:
        """One training, from the cache where it is there."""
        changed: dict[str, Any] = dict(_SHORT[setting])
        if setting != "sst2" and "block_size" in SETTINGS[setting]["data"]:
            changed["data"] = SETTINGS[setting]["data"] | {"block_size": 64}
        changed |= {"evaluate_batches": 30, "curve": False, "parts": ["test"]}
        if setting == CHOSEN_IN and seed == TUNING_SEED:
            changed["parts"] = ["choose", "test"]
        if self.opts.quick:
            changed |= {"steps": 8, "evaluate_batches": 4}
        if rate is not None:
            changed["optimizer"] = SETTINGS[setting]["optimizer"] | {"lr": rate}
        config = configuration(setting, *key, seed, **changed)
        cache = self.opts.out / ".cache"
        done = (cache / "locater" / f"{cache_key(config)}.json").is_file()
        found = cached_train(config, self.opts.data, cache)["results"]
        self._runs[setting, key, seed, rate] = found
        if not done:
            loss = self.score(setting, key, seed, rate)
            print(f"  {setting} {key} seed {seed} rate {rate}: {loss:.4f}", flush=True)

    def score(self, setting: str, key: Key, seed: int, rate: float | None = None) -> float:
        """The held-out loss, lower is better; NaN where training left the finite numbers."""
        return float(self._runs[setting, key, seed, rate]["test"]["loss"])

    def of(self, setting: str, key: Key, seed: int) -> dict[str, Any] | None:
        """One run's numbers; None where it was not made."""
        return self._runs.get((setting, key, seed, None))

    def chosen(self) -> dict[str, Key]:
        """Method → the coefficient with the lowest loss in the one-layer setting, on the part to choose by."""
        out = {}
        for method in (*SWEEP, "share"):
            keys = [key for key in sweep(self.opts) if key[0] == method]
            out[method] = min(keys, key=self._to_choose_by)
        return out

    def _to_choose_by(self, key: Key) -> float:
        return float(self._runs[CHOSEN_IN, key, TUNING_SEED, None]["choose"]["loss"])

    def gains(self, setting: str, key: Key) -> list[float]:
        """How much lower the held-out loss is than without, seed by seed."""
        seeds = [
            seed for seed in range(SEEDS) if self.of(setting, key, seed) and self.of(setting, _BASE, seed)
        ]
        return [self.score(setting, _BASE, seed) - self.score(setting, key, seed) for seed in seeds]

    def best(self, setting: str, method: str) -> tuple[Key, float] | None:
        """The best of the sweep in a setting, and its gain; None where the sweep was not made."""
        keys = [key for key in sweep(self.opts) if key[0] == method and self.of(setting, key, TUNING_SEED)]
        if not keys or not self.of(setting, _BASE, TUNING_SEED):
            return None
        best = min(keys, key=lambda key: _known(self.score(setting, key, TUNING_SEED)))
        gain = self.score(setting, _BASE, TUNING_SEED) - self.score(setting, best, TUNING_SEED)
        return best, gain

    def stable(self) -> dict[str, dict[str, list[list[float]]]]:
        """Setting → method → pairs of learning rate and held-out loss."""
        out: dict[str, dict[str, list[list[float]]]] = {}
        for setting, key, seed, rate in self._runs:
            if rate is not None:
                rows = out.setdefault(setting, {}).setdefault(key[0], [])
                rows.append([rate, _known(self.score(setting, key, seed, rate))])
        return out


def _known(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def publish(results: Results, chosen: Mapping[str, Key], clock: Clock) -> None:
    """Write what there is."""
    table = []
    for setting in results.settings:
        bases = [results.of(setting, _BASE, seed) for seed in range(SEEDS)]
        losses = [run["test"]["loss"] for run in bases if run]
        row: dict[str, Any] = {"setting": setting, "seeds": len(losses), "title": TITLES[setting]}
        if losses:
            row["none"] = shown_interval(losses)
        for method, key in chosen.items():
            gains = results.gains(setting, key)
            if gains:
                runs = [run for run in (results.of(setting, key, seed) for seed in range(SEEDS)) if run]
                row[method] = {
                    "gain": shown_interval(gains),
                    "weights": [run["weight"] for run in runs if "weight" in run],
                    "entropy": sum(run["entropy"] for run in runs) / len(runs),
                    "entropy_without": sum(run["entropy"] for run in bases if run) / len(losses),
                }
            best = results.best(setting, method)
            if best is not None:
                row.setdefault(method, {}).update(best=best[0][1], best_gain=best[1])
        row["sweep"] = [
            {"method": key[0], "coefficient": key[1], "loss": results.score(setting, key, TUNING_SEED)}
            for key in sweep(results.opts)
            if results.of(setting, key, TUNING_SEED)
        ]
        table.append(row)
    found = {
        "chosen": {method: key[1] for method, key in chosen.items()},
        "settings": table,
        "rates": results.stable(),
        "seeds": SEEDS,
        "steps": {name: fields["steps"] for name, fields in _SHORT.items()},
    }
    write(NAME, found, results.opts, clock)
    draw(found, results.opts)


def draw(found: Mapping[str, Any], opts: Options) -> None:
    """Loss over coefficients in each setting for both forms, and over learning rates."""
    methods = ("tokens", "variance")
    fig, axes = figure(1, 3, width=4.6, height=3.4)
    for axis, method in zip(axes[0], methods, strict=False):
        for row in found["settings"]:
            points = [one for one in row["sweep"] if one["method"] == method]
            base = [one["loss"] for one in row["sweep"] if one["method"] == "baseline"]
            if not points or not base:
                continue
            (line,) = axis.plot(
                [one["coefficient"] for one in points],
                [base[0] - one["loss"] for one in points],
                marker="o",
                ms=3,
                label=row["title"],
            )
            best = max(points, key=lambda one: base[0] - one["loss"])
            axis.plot(best["coefficient"], base[0] - best["loss"], "*", color=line.get_color(), ms=11)
        axis.axvline(found["chosen"][method], color="black", linewidth=0.8, linestyle=":")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=0.02)
        axis.set(xlabel=f"coefficient, {LABELS[method]} form", title="stars: each setting's best; one seed")
    axes[0][0].set_ylabel("held-out loss: gain over none [nats]")
    axes[0][0].legend(fontsize=6)
    colors = ("tab:blue", "tab:orange", "tab:green")
    for (setting, methods_of), color in zip(found["rates"].items(), colors, strict=False):
        for method, rows in methods_of.items():
            kept = [(rate, loss) for rate, loss in rows if math.isfinite(loss)]
            style = {"baseline": "--", "tokens": "-", "share": ":"}[method]
            axes[0][2].plot(*zip(*kept, strict=True), style, color=color, label=f"{setting}, {method}")
    axes[0][2].set_xscale("log")
    axes[0][2].set(xlabel="learning rate", ylabel="held-out loss [nats]")
    if found["rates"]:
        axes[0][2].legend(fontsize=6)
    save(fig, NAME, opts)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
