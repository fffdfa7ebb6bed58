"""Does LocAteR pay? Scores, entropy and spectra against baselines, in the paper's setting and beyond.

    python examples/paper/locater.py [--quick] [--only SETTING] [--jobs 2]

Each run's numbers are kept in ``OUT/.cache/locater`` under its configuration: an interrupted call goes on.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import Clock, Interval, Options, figure, in_parallel, interval, options, read, save, write
from material import words
from settings import SETTINGS, configuration
from train import SPECTRA, train

NAME = "locater"
_CURVES = ("steps", *SPECTRA, "entropy_steps", "entropy")
TUNING_SEEDS = (100,)
"""Seeds of the sweep that coefficients are chosen by; the comparison has others."""

_FORMAT = 1  # part of the cache's keys: raise it where the same configuration gives other numbers

SWEEP: dict[str, list[float]] = {
    "variance": [0.04, 0.4, 1.2, 4.0, 40.0, 400.0],
    "target": [0.04, 0.4, 1.2, 4.0, 40.0],
    "raised": [40.0],
    "weight_decay": [1e-4, 3e-4, 1e-3, 1e-2, 1e-1],
    "entropy": [0.1, 0.5, 2.0],
}
"""Coefficients of the paper's setting, on the loss; LocAteR's with ``support="model"``."""

BEYOND: dict[str, list[tuple[str, float | None]]] = {
    setting: [
        ("variance", first),
        ("variance", second),
        ("weight_decay", decay),
        ("sigma_reparam", None),
        ("entropy", reward),
    ]
    for setting, first, second, decay, reward in (
        ("gpt_pre", 0.4, 40.0, 1e-2, 0.5),
        ("gpt_post", 0.4, 40.0, 1e-2, 0.5),
        ("vit", 0.4, 40.0, 1e-2, 0.5),
        ("sst2", 1e-3, 1e-2, 1e-4, 0.1),
    )
}
"""What is compared with the baseline in the other settings: nothing is chosen there, all is shown. Where a network
is trained from the start, one of LocAteR's coefficients is that of the paper's setting."""

TITLES = {
    "paper": "the paper's: 1 layer, 1 head, post-LN",
    "gpt_pre": "GPT-2, 4 layers, 4 heads, pre-LN",
    "gpt_post": "OPT, 4 layers, 4 heads, post-LN",
    "vit": "ViT on digits, 4 layers, 4 heads",
    "sst2": "MiniLM fine-tuned on SST-2",
}
LABELS = {
    "baseline": "no regularizer",
    "variance": "LocAteR, variance",
    "target": "LocAteR, target",
    "raised": "LocAteR, mean raised",
    "weight_decay": "decay of $W_q$, $W_k$",
    "matched_decay": "decay of $W_q$, $W_k$ to the same $F$",
    "sigma_reparam": "σReparam",
    "entropy": "entropy reward",
}
_STYLE = {
    "baseline": ("black", "o", "-"),
    "variance": ("tab:blue", "s", "-"),
    "target": ("tab:cyan", "D", "--"),
    "raised": ("tab:green", "*", "-."),
    "weight_decay": ("tab:orange", "^", "-"),
    "matched_decay": ("tab:brown", "<", ":"),
    "sigma_reparam": ("tab:gray", "v", "-."),
    "entropy": ("tab:purple", "P", "--"),
}

Key = tuple[str, float | None]
"""A method and its coefficient."""

_BASE: Key = ("baseline", None)

_COMPARED = ("variance", "weight_decay", "entropy")
"""Methods that go into the comparison with the coefficient that the sweep chose; of LocAteR's forms one, since the
sweep shows no difference between the two."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not in the cache, then write results and figures."""
    parser = argparse.ArgumentParser(add_help=False)
    own = [name for name in SETTINGS if name == "paper" or name in BEYOND]
    parser.add_argument("--only", choices=own, help="one setting; the results of others stay")
    given, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    opts = options(__doc__ + f"\n--only: one of {', '.join(own)}", rest)
    clock = Clock()
    settings = [given.only] if given.only else own
    results = _earlier(opts) if given.only else {}
    cache = opts.out / ".cache"
    if any(SETTINGS[setting]["data"]["kind"] == "words" for setting in settings):
        _prepare(opts, cache)  # once, before several processes need it
    if opts.quick:  # starting processes takes longer than such runs
        _trained([config for setting in settings for config in _known(setting, opts)], opts, cache)
    for setting in settings:
        found = paper(opts, cache) if setting == "paper" else beyond(setting, opts, cache)
        results[setting] = _made(setting, opts) | found
        results = {name: results[name] for name in SETTINGS if name in results}
        publish(results, opts, clock)


def publish(results: Mapping[str, Any], opts: Options, clock: Clock) -> None:
    """Write results and figures of the settings that are done."""
    write(
        NAME, {"interval": "mean, low, high: 95 %, Student's t over seeds", "settings": results}, opts, clock
    )
    if "paper" in results:
        draw_paper(results["paper"], opts)
        draw_spectra(results["paper"], opts)
    others = {name: found for name, found in results.items() if name != "paper"}
    if others:
        draw_settings(others, opts)


def _earlier(opts: Options) -> dict[str, Any]:
    return read(NAME, opts.out)["settings"] if (opts.out / f"{NAME}.json").is_file() else {}


def paper(opts: Options, cache: Path) -> dict[str, Any]:
    """The paper's setting: a sweep on seeds of its own, then the comparison of what it chose."""
    swept = Runs("paper", _sweep(opts), TUNING_SEEDS, _trained(_known("paper", opts), opts, cache))
    compared = {"baseline": _BASE, **choose(swept)}
    seeds = _seeds("paper", opts)
    configs = [_configuration("paper", key, seed, opts) for key in compared.values() for seed in seeds]
    found = Runs("paper", list(compared.values()), seeds, _trained(configs, opts, cache))
    return {
        "tuning": {"seeds": list(TUNING_SEEDS), "runs": swept.summary()},
        "chosen": {label: key[1] for label, key in compared.items()},
        "main": {"seeds": list(seeds), "runs": found.summary(list(compared))},
        "curves": found.curves(list(compared)),
    }


def beyond(setting: str, opts: Options, cache: Path) -> dict[str, Any]:
    """Another setting: everything in the list, nothing chosen."""
    runs = _trained(_known(setting, opts), opts, cache)
    found = Runs(setting, _beyond(setting, opts), _seeds(setting, opts), runs)
    return {
        "main": {"seeds": found.seeds, "runs": found.summary()},
        "curves": found.curves(),
    }


def _known(setting: str, opts: Options) -> list[dict[str, Any]]:
    """The runs that depend on the results of no others."""
    keys = _sweep(opts) if setting == "paper" else _beyond(setting, opts)
    seeds = TUNING_SEEDS if setting == "paper" else _seeds(setting, opts)
    return [_configuration(setting, key, seed, opts) for seed in seeds for key in keys]


class Runs:
    """The runs of one setting: for each key one a seed."""

    def __init__(
        self, setting: str, keys: Sequence[Key], seeds: Sequence[int], runs: Iterable[Mapping[str, Any]]
    ) -> None:
        self.setting = setting
        self.seeds = list(seeds)
        self.metric = (
            "perplexity" if SETTINGS[setting].get("task", "causal_lm") == "causal_lm" else "accuracy"
        )
        found = {
            (run["setting"], run["method"], run["coefficient"], run["seed"]): run["results"] for run in runs
        }
        self.runs = {key: [found[(setting, *key, seed)] for seed in self.seeds] for key in keys}

    def scores(self, key: Key, part: str = "test", metric: str | None = None) -> list[float]:
        """One a seed."""
        return [run[part][metric or self.metric] for run in self.runs[key]]

    def mean(self, key: Key, part: str) -> float:
        """Of the metric, over seeds."""
        scores = self.scores(key, part)
        return sum(scores) / len(scores)

    def final(self, key: Key, name: str) -> list[float]:
        """A statistic of the spectrum after the last step, one a seed."""
        return [run["spectrum"][name][-1] for run in self.runs[key]]

    def summary(self, labels: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Of each key: means with intervals, and gains over the baseline paired by seed."""
        rows = []
        for label, key in zip(labels or [method for method, _ in self.runs], self.runs, strict=True):
            row: dict[str, Any] = {
                "label": label,
                "method": key[0],
                "coefficient": key[1],
                "n": len(self.seeds),
            }
            measured = {
                self.metric: self.scores(key),
                "loss": self.scores(key, metric="loss"),
                "train_loss": [run["train_loss"] for run in self.runs[key]],
                "entropy": [run["entropy"] for run in self.runs[key]],
                "similarity": [run["similarity"] for run in self.runs[key]],
                "cpu_seconds": [run["cpu_seconds"] for run in self.runs[key]],
                **{name: self.final(key, name) for name in SPECTRA},
            }
            if all("choose" in run for run in self.runs[key]):
                measured[f"choose_{self.metric}"] = self.scores(key, "choose")
            row |= {name: shown_interval(values) for name, values in measured.items()}
            row["scores"] = self.scores(key)
            if key != _BASE:
                paired = {
                    "gain": _differences(self.scores(key), self.scores(_BASE), self.metric == "perplexity"),
                    "loss_gain": _differences(
                        self.scores(key, metric="loss"), self.scores(_BASE, metric="loss"), True
                    ),
                    "entropy_gain": [
                        own["entropy"] - other["entropy"]
                        for own, other in zip(self.runs[key], self.runs[_BASE], strict=True)
                    ],
                    "cost": [
                        own["cpu_seconds"] / other["cpu_seconds"]
                        for own, other in zip(self.runs[key], self.runs[_BASE], strict=True)
                    ],
                }
                row |= {name: shown_interval(values) for name, values in paired.items()}
            rows.append(row)
        return rows

    def curves(self, labels: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Of each key over steps, means over seeds: spectrum and entropy over heads, and held-out losses."""
        rows = []
        for label, (key, runs) in zip(labels or [m for m, _ in self.runs], self.runs.items(), strict=True):
            spectra = {name: [run["spectrum"][name] for run in runs] for name in _CURVES}
            losses = {f"held_out_{name}": [run["curve"][name] for run in runs] for name in ("steps", "loss")}
            row = {
                name: [sum(point) / len(point) for point in zip(*values, strict=True)]
                for name, values in (spectra | losses).items()
            }
            gains = [
                [other - own for own, other in zip(run["curve"]["loss"], base["curve"]["loss"], strict=True)]
                for run, base in zip(runs, self.runs[_BASE], strict=True)
            ]
            row["held_out_gain"] = [shown_interval(values) for values in zip(*gains, strict=True)]
            rows.append({"label": label, "coefficient": key[1], **row})
        return rows


def choose(sweep: Runs) -> dict[str, Key]:
    """Label → what goes into the comparison: each method's best coefficient by the part that is not tested on.

    ``matched_decay`` is decay of W_q and W_k of the same strength as the chosen variance form: that coefficient
    of the sweep which leaves the nearest F = ‖W_QK‖², on a logarithmic scale.
    """
    chosen: dict[str, Key] = {}
    for method in _COMPARED:
        keys = [key for key in sweep.runs if key[0] == method]
        chosen[method] = min(keys, key=lambda key: sweep.mean(key, "choose"))
    chosen["sigma_reparam"] = ("sigma_reparam", None)
    aim = _log_mean(sweep.final(chosen["variance"], "frobenius_sq"))
    decays = [key for key in sweep.runs if key[0] == "weight_decay"]
    nearest = min(decays, key=lambda key: abs(_log_mean(sweep.final(key, "frobenius_sq")) - aim))
    if nearest != chosen["weight_decay"]:
        chosen["matched_decay"] = nearest
    return chosen


def cache_key(config: Mapping[str, Any]) -> str:
    """A name for everything that a run depends on."""
    text = json.dumps({"format": _FORMAT, **config}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def cached_train(config: dict[str, Any], data: Path | None, cache: Path) -> dict[str, Any]:
    """One run, from the cache where it is there; in a process of its own."""
    path = cache / NAME / f"{cache_key(config)}.json"
    if not path.is_file():
        import torch

        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        results = train(config, data, cache)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({**config, "results": results}))
        partial.replace(path)
    return json.loads(path.read_text())


def _trained(configs: list[dict[str, Any]], opts: Options, cache: Path) -> list[dict[str, Any]]:
    missing = [c for c in configs if not (cache / NAME / f"{cache_key(c)}.json").is_file()]
    if missing:
        in_parallel(cached_train, [(config, opts.data, cache) for config in missing], opts.jobs, "trainings")
    return [cached_train(config, opts.data, cache) for config in configs]


def _prepare(opts: Options, cache: Path) -> None:
    fields = {name: value for name, value in SETTINGS["paper"]["data"].items() if name != "kind"}
    words(opts.data, cache, seed=0, **fields).prepare_data()


def _seeds(setting: str, opts: Options) -> range:
    if setting == "paper":
        return range(opts.pick(opts.seeds, 2))
    return range(opts.pick(3, 1))


def _sweep(opts: Options) -> list[Key]:
    swept = opts.pick(SWEEP, {method: values[1:2] for method, values in SWEEP.items() if method in _COMPARED})
    return [_BASE, *((method, value) for method, values in swept.items() for value in values)]


def _beyond(setting: str, opts: Options) -> list[Key]:
    return [_BASE, *opts.pick(BEYOND[setting], BEYOND[setting][:1])]


def _changed(setting: str, opts: Options) -> dict[str, Any]:
    """Fields of a setting, fewer steps in the quick one."""
    fields = {name: SETTINGS[setting][name] for name in ("data", "steps")}
    return fields | opts.pick({}, {"steps": 20 if setting == "paper" else 10, "evaluate_batches": 8})


def _configuration(setting: str, key: Key, seed: int, opts: Options) -> dict[str, Any]:
    return configuration(setting, *key, seed, **_changed(setting, opts))


def _made(setting: str, opts: Options) -> dict[str, Any]:
    config = _configuration(setting, ("baseline", None), 0, opts)
    return {"configuration": {k: v for k, v in config.items() if k not in ("method", "coefficient", "seed")}}


def shown_interval(values: Sequence[float]) -> Interval:
    """An interval over seeds; of one seed, its value."""
    return interval(values) if len(values) > 1 else Interval(values[0], values[0], values[0])


def _differences(own: Sequence[float], base: Sequence[float], lower_is_better: bool) -> list[float]:
    """How much better than the baseline, seed by seed."""
    sign = -1 if lower_is_better else 1
    return [sign * (a - b) for a, b in zip(own, base, strict=True)]


def _log_mean(values: Sequence[float]) -> float:
    from math import log

    return sum(log(value) for value in values) / len(values)


def draw_paper(found: Mapping[str, Any], opts: Options) -> None:
    """Gains of the methods with intervals; and the sweeps against the scale of the spectrum that they leave."""
    fig, axes = figure(1, 3, width=4.2, height=3.4)
    gains, sweep, scale = axes[0]
    runs = [run for run in found["main"]["runs"] if run["method"] != "baseline"]
    _draw_gains(gains, runs, "perplexity gain over no regularizer")
    gains.set_title(f"main comparison, {len(found['main']['seeds'])} seeds, 95 % intervals")
    swept = found["tuning"]["runs"]
    (base,) = [run for run in swept if run["method"] == "baseline"]
    for method in SWEEP:
        color, marker, line = _STYLE[method]
        own = [run for run in swept if run["method"] == method]
        style = {"color": color, "marker": marker, "linestyle": line, "label": LABELS[method]}
        scores = [run["choose_perplexity"][0] for run in own]
        sweep.plot([run["coefficient"] for run in own], scores, **style)
        scale.plot([run["frobenius_sq"][0] for run in own], scores, **style)
    for axis, label in ((sweep, "coefficient on the loss"), (scale, "$F=\\|W_{QK}\\|_F^2$ after training")):
        axis.axhline(
            base["choose_perplexity"][0], color="black", linewidth=1, linestyle=":", label="no regularizer"
        )
        axis.set(xscale="log", xlabel=label, ylabel="perplexity, held-out part to choose by")
    scale.plot(base["frobenius_sq"][0], base["choose_perplexity"][0], "ko")
    sweep.set_title(f"sweep, seeds {', '.join(map(str, found['tuning']['seeds']))}")
    scale.set_title("the same, by the scale that is left")
    sweep.legend(fontsize=7)
    save(fig, f"{NAME}_paper", opts)


def draw_settings(results: Mapping[str, Any], opts: Options) -> None:
    """Gains in the other settings."""
    fig, axes = figure(2, (len(results) + 1) // 2, width=5.0, height=3.0)
    for axis, (setting, found) in zip(axes.flat, results.items(), strict=False):
        runs = [run for run in found["main"]["runs"] if run["method"] != "baseline"]
        is_accuracy = "accuracy" in runs[0]
        unit = "accuracy gain [%]" if is_accuracy else "perplexity gain"
        _draw_gains(axis, runs, f"{unit} over no regularizer", 100 if is_accuracy else 1)
        (base,) = [run for run in found["main"]["runs"] if run["method"] == "baseline"]
        score = f"{100 * base['accuracy'][0]:.1f} %" if is_accuracy else f"{base['perplexity'][0]:.1f}"
        axis.set_title(f"{TITLES[setting]} ({len(found['main']['seeds'])} seeds; none: {score})", fontsize=8)
    for axis in axes.flat[len(results) :]:
        axis.set_axis_off()
    save(fig, f"{NAME}_settings", opts)


def draw_spectra(found: Mapping[str, Any], opts: Options) -> None:
    """How spectra and entropy go over steps in the paper's setting."""
    fig, axes = figure(1, 4, width=3.6, height=3.2)
    panels = (
        ("sym_var", "symmetric variance of the spectrum", "steps"),
        ("eig_mean", "mean of the eigenvalues", "steps"),
        ("entropy", "normalized attention entropy (training)", "entropy_steps"),
    )
    for axis, (name, title, steps) in zip(axes[0], panels, strict=False):
        for run in found["curves"]:
            color, marker, line = _STYLE[run["label"]]
            axis.plot(
                run[steps],
                run[name],
                color=color,
                marker=marker,
                linestyle=line,
                ms=3,
                label=LABELS[run["label"]],
            )
        axis.set(xlabel="optimizer steps", ylabel=title)
    gain = axes[0][3]
    for run in found["curves"]:
        color, marker, line = _STYLE[run["label"]]
        gain.plot(
            run["held_out_steps"],
            [mean for mean, _, _ in run["held_out_gain"]],
            color=color,
            marker=marker,
            linestyle=line,
            ms=3,
        )
    gain.set(xlabel="optimizer steps", ylabel="gain in held-out loss [nats]")
    axes[0][0].set_yscale("log")
    axes[0][1].axhline(0, color="black", linewidth=0.5)
    axes[0][0].legend(fontsize=7)
    axes[0][1].set_title(f"the paper's setting, means over {len(found['main']['seeds'])} seeds")
    save(fig, f"{NAME}_spectra", opts)


def _draw_gains(axis: Any, runs: Sequence[Mapping[str, Any]], title: str, factor: float = 1.0) -> None:
    for place, run in enumerate(reversed(runs)):
        mean, low, high = (factor * value for value in run["gain"])
        color, marker, _ = _STYLE[run["label"]]
        axis.errorbar(
            mean,
            place,
            xerr=[[mean - low], [high - mean]],
            color=color,
            marker=marker,
            capsize=3,
            linestyle="none",
        )
    names = [
        LABELS[run["label"]] + ("" if run["coefficient"] is None else f", {run['coefficient']:g}")
        for run in runs
    ]
    axis.set_yticks(range(len(runs)), names[::-1], fontsize=7)
    axis.set_ylim(-0.6, len(runs) - 0.4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(f"{title} (higher is better)")


if __name__ == "__main__":
    main()
