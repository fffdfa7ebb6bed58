"""Two failure modes, rank collapse and entropy collapse: where runs travel before they fail, what LocAteR changes.

    python examples/paper/failures.py [--quick]

Each run's curves are kept in ``OUT/.cache/failures``: an interrupted call goes on. Delete it to run all again.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Clock, Options, cached, figure, in_parallel, interval, options, save, write
from material import hub_copy, words
from torch import Tensor
from train import token_similarity

_FORMAT = 1  # part of the cache's keys: raise it where the same arguments give other numbers
WIDTH, HEADS = 64, 2
SCALE = (WIDTH // HEADS) ** -0.5
VOCABULARY, LENGTH, BATCH = 2000, 64, 8
# How each mode is brought about.
MODES: dict[str, dict[str, float]] = {
    "healthy": {"skip": 1.0, "qk_init": 1.0, "lr": 3e-3, "warmup": 20},
    # The skip connection around each layer passes on four fifths, or half, of what comes in.
    "rank_mild": {"skip": 0.8, "qk_init": 1.0, "lr": 3e-3, "warmup": 20},
    "rank": {"skip": 0.5, "qk_init": 1.0, "lr": 3e-3, "warmup": 20},
    # Query and key weights eight times as large, seven times the learning rate, no warm-up.
    "entropy": {"skip": 1.0, "qk_init": 8.0, "lr": 2e-2, "warmup": 0},
}
TITLES = {
    "healthy": "healthy",
    "rank_mild": "rank collapse, skip 0.8",
    "rank": "rank collapse, skip 0.5",
    "entropy": "entropy collapse",
}
# Of which criterion a mode fails, and at which mode its weights are chosen.
CRITERION = {"healthy": None, "rank_mild": "rank", "rank": "rank", "entropy": "entropy"}
CHOSEN_AT = {"rank_mild": "rank_mild", "rank": "rank_mild", "entropy": "entropy"}
NU = 10.0  # against 1 on the scale: the mean is held near the target
FORMS = ("variance", "target")
WEIGHTS = (0.0003, 0.01, 0.3, 10.0)
TARGET = 0.5  # mean eigenvalue that the target form holds: a self-logit of s · TARGET · d, about 6
CHOICE_SEED = 100  # weights are chosen on a seed that the comparison does not have
SIMILAR, PEAKED, MARGIN = 0.95, 0.1, 0.02
JUDGED_FROM = 40  # steps: before, every run falls to the loss of the words' frequencies, its tokens alike


def work(
    mode: str,
    form: str | None,
    weight: float,
    seed: int,
    steps: int,
    layers: int,
    every: int,
    data: str,
    cache: str,
) -> dict[str, Any]:
    """The curves of one network, trained if the cache does not have them."""
    how = [_FORMAT, mode, MODES[mode], form, weight, seed, steps, layers, every, TARGET, NU]
    sizes = [WIDTH, HEADS, VOCABULARY, LENGTH, BATCH]
    arguments = (mode, form, weight, seed, steps, layers, every, data, cache)
    return cached(Path(cache) / "failures", [how, sizes], lambda: train(*arguments))


def train(
    mode: str,
    form: str | None,
    weight: float,
    seed: int,
    steps: int,
    layers: int,
    every: int,
    data: str,
    cache: str,
) -> dict[str, Any]:
    """Train one network and return its curves."""
    import lightning as L

    from lightning_qk import AttentionMonitor, LocAteR, QKSpectrumMonitor, TransformerModule

    torch.set_num_threads(1)
    L.seed_everything(seed, verbose=False)
    how = MODES[mode]
    corpus = words(
        Path(data), Path(cache), seed=seed, vocab_size=VOCABULARY, block_size=LENGTH, batch_size=BATCH
    )
    module = TransformerModule(
        {
            "model_type": "granite",
            "hidden_size": WIDTH,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "intermediate_size": 2 * WIDTH,
            "max_position_embeddings": LENGTH,
            "attention_multiplier": SCALE,
        },
        lr=how["lr"],
        schedule="constant",
        warmup_steps=int(how["warmup"]),
    )
    attention = AttentionMonitor(every, rows=32, every_n_eval_batches=0, figures_every=0, report=False)
    spectrum = QKSpectrumMonitor(every, figures_every=0, report=False)
    watch = _make_watch(every, how["qk_init"], how["skip"])
    locater = []
    if form is not None:
        locater = [LocAteR(weight, form=form, target=TARGET if form == "target" else None, nu=NU)]
    trainer = L.Trainer(
        max_steps=steps,
        log_every_n_steps=every,
        callbacks=[watch, attention, spectrum, *locater],
        check_val_every_n_epoch=10**9,
        num_sanity_val_steps=0,
        limit_val_batches=30,
        limit_test_batches=30,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
    )
    trainer.fit(module, corpus)
    (chosen_by,) = trainer.validate(module, corpus, verbose=False)
    (tested,) = trainer.test(module, corpus, verbose=False)
    assert attention.history is not None
    assert spectrum.history is not None
    counts = torch.bincount(torch.cat([batch["input_ids"].flatten() for batch in corpus.train_dataloader()]))
    return {
        "mode": mode,
        "form": form,
        "weight": weight,
        "seed": seed,
        "choice_loss": chosen_by["val/loss"],
        "test_loss": tested["test/loss"],
        "unigram_loss": unigram_loss(counts, VOCABULARY, corpus.test_dataloader()),
        "steps": [step + 1 for step in attention.history.steps],
        "loss": watch.losses,
        "similarity": watch.similarities,
        "entropy": attention.history.layer_series("entropy_normalized").tolist(),
        # d times mean and variance of the eigenvalues, the softmax scale in them; means over the heads.
        "plane_steps": [step + 1 for step in spectrum.history.steps],
        "mean": (WIDTH * SCALE * spectrum.history.layer_series("eig_mean")).tolist(),
        "variance": (WIDTH * SCALE**2 * spectrum.history.layer_series("sym_var")).tolist(),
    }


def unigram_loss(counts: Tensor, vocabulary: int, batches: Any, limit: int = 30) -> float:
    """Mean loss of the words' training frequencies, one more of each, on the same batches."""
    counts = torch.cat([counts, counts.new_zeros(vocabulary - len(counts))]).double() + 1
    surprise = -(counts / counts.sum()).log()
    total, number = 0.0, 0
    for batch in itertools.islice(batches, limit):
        targets = batch["labels"][:, 1:].flatten()
        targets = targets[targets >= 0]
        total, number = total + float(surprise[targets].sum()), number + len(targets)
    return total / number


def _make_watch(every: int, qk_init: float, skip: float) -> Any:
    """A callback: scales query and key weights and skip connections, keeps losses and token similarities."""
    import lightning as L

    from lightning_qk import head_projections

    def weaken(layer: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # x + f(x) becomes skip x + f(x); the skip connection within the layer, before its MLP, stays.
        return output - (1 - skip) * given[0]

    class Watch(L.Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.similarities: list[list[float]] = []
            self._since: list[float] = []
            self._now: dict[int, float] = {}
            self._hooks: list[Any] = []

        def on_train_start(self, trainer: Any, module: Any) -> None:
            with torch.no_grad():
                for layer in head_projections(module).values():  # views of the live weights
                    layer.query.mul_(qk_init)
                    layer.key.mul_(qk_init)
            if skip != 1:
                for layer in module.network.get_decoder().layers:
                    layer.register_forward_hook(weaken)

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if (trainer.global_step + 1) % every == 0:
                layers = module.network.get_decoder().layers
                self._hooks = [layer.register_forward_hook(self._hear(i)) for i, layer in enumerate(layers)]

        def _hear(self, index: int) -> Any:
            def hook(layer: Any, given: Any, output: Tensor) -> None:
                self._now[index] = token_similarity(output.detach()).mean().item()

            return hook

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self._since.append(outputs["loss"].item())
            if self._hooks:
                for hook in self._hooks:
                    hook.remove()
                self._hooks = []
                self.losses.append(sum(self._since) / len(self._since))
                self.similarities.append(list(self._now.values()))
                self._since = []

    return Watch()


def failing(run: Mapping[str, Any], healthy_loss: Sequence[float]) -> dict[str, list[bool]]:
    """At which of the measured steps a run fails, by the criteria of both modes.

    From step 40 on, where the training loss is above that of the healthy run of the same seed, which has the same
    batches, by 0.02 or more (or is no number), and

    - rank: the last layer's tokens have a mean cosine above 0.95;
    - entropy: some layer's normalized entropy, the mean over its heads, is below 0.1.
    """
    behind = [
        step >= JUDGED_FROM and not loss < reference + MARGIN
        for step, loss, reference in zip(run["steps"], run["loss"], healthy_loss, strict=True)
    ]
    collapsed = {
        "rank": [layers[-1] > SIMILAR for layers in run["similarity"]],
        "entropy": [min(layers) < PEAKED for layers in run["entropy"]],
    }
    return {
        name: [one and late for one, late in zip(states, behind, strict=True)]
        for name, states in collapsed.items()
    }


def told(run: Mapping[str, Any], healthy_loss: Sequence[float]) -> dict[str, Any]:
    """One run's numbers: when it fails, whether it recovers, how well it ends."""
    out: dict[str, Any] = {name: run[name] for name in ("seed", "test_loss", "choice_loss")}
    for mode, states in failing(run, healthy_loss).items():
        out[mode] = {
            "first_failure": next((run["steps"][i] for i, fails in enumerate(states) if fails), None),
            "last_failure": next((run["steps"][i] for i in reversed(range(len(states))) if states[i]), None),
            "share_of_steps": sum(states) / len(states),
            "at_end": states[-1],
        }
    out["lowest_entropy"] = min(min(layers) for layers in run["entropy"])
    out["lowest_entropy_at_end"] = min(run["entropy"][-1])
    out["similarity_at_end"] = run["similarity"][-1][-1]
    return out


def compare(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All runs of the comparison: each told, and differences to the same seeds without LocAteR."""
    reference = {run["seed"]: run["loss"] for run in runs if run["mode"] == "healthy"}
    out: dict[str, Any] = {}
    for mode in MODES:
        if not any(run["mode"] == mode for run in runs):
            continue
        out[mode] = {}
        for form in (None, *FORMS):
            own = [run for run in runs if (run["mode"], run["form"]) == (mode, form)]
            if not own:
                continue
            each = [told(run, reference[run["seed"]]) for run in own]
            out[mode][form or "none"] = {
                "weight": own[0]["weight"],
                "n": len(each),
                "runs": each,
                "test_loss": interval(one["test_loss"] for one in each)._asdict(),
                "above_unigram": interval(run["test_loss"] - run["unigram_loss"] for run in own)._asdict(),
                "curves": curves(own),
            }
        base = out[mode]["none"]["runs"]
        for form in FORMS:
            if form not in out[mode]:
                continue
            pairs = list(zip(out[mode][form]["runs"], base, strict=True))
            out[mode][form]["difference_to_none"] = {
                "test_loss": interval(
                    one["test_loss"] - other["test_loss"] for one, other in pairs
                )._asdict(),
                "share_of_steps_failing": interval(
                    one[CRITERION[mode]]["share_of_steps"] - other[CRITERION[mode]]["share_of_steps"]
                    for one, other in pairs
                )._asdict(),
                "lowest_entropy_at_end": interval(
                    one["lowest_entropy_at_end"] - other["lowest_entropy_at_end"] for one, other in pairs
                )._asdict(),
                "similarity_at_end": interval(
                    one["similarity_at_end"] - other["similarity_at_end"] for one, other in pairs
                )._asdict(),
            }
    return out


def curves(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds."""

    def mean(name: str) -> Tensor:
        return torch.tensor([run[name] for run in runs], dtype=torch.float64).mean(0)

    entropy = torch.tensor([run["entropy"] for run in runs])
    return {
        "steps": runs[0]["steps"],
        "loss": mean("loss"),
        "lowest_entropy": entropy.amin(-1).mean(0),
        "mean_entropy": entropy.mean((0, -1)),
        "similarity": mean("similarity")[:, -1],
        "plane_steps": runs[0]["plane_steps"],
        "trace": mean("mean").mean(-1),
        "variance": mean("variance").log().mean(-1).exp(),
    }


def chosen(sweep: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """The weight of the lowest loss on the part to choose by, for each mode and form."""
    best = {}
    for mode, form in itertools.product(CHOSEN_AT, FORMS):
        own = [run for run in sweep if (run["mode"], run["form"]) == (CHOSEN_AT[mode], form)]
        # A loss that is no number is the worst.
        best[mode, form] = min(own, key=lambda run: (math.isnan(run["choice_loss"]), run["choice_loss"]))[
            "weight"
        ]
    return best


_COLOURS = {"none": "C0", "variance": "C1", "target": "C2"}
_STYLES = {"none": "-", "variance": "--", "target": "-."}
_LABELS = {"none": "no LocAteR", "variance": "LocAteR, variance form", "target": "LocAteR, target form"}


def draw_plane(modes: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], opts: Options) -> None:
    """The way of each run's layers through the plane of eigenvalue mean and variance."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from theory import classify, symmetric_map
    from walks import D_MODEL

    names, colours = ["uniform", "localized", "saturated"], ["#dce9f5", "#ffd9b0", "#d9d9d9"]
    means = torch.linspace(-9, 9, 181, dtype=torch.float64)
    variances = torch.logspace(-5, 4, 181, dtype=torch.float64)
    # The axes are d times mean and variance, of which the formula depends on little else than their values.
    rho = symmetric_map(means / D_MODEL, variances / D_MODEL)
    kinds = torch.tensor([names.index(kind) for kind in classify(rho.flatten(1))]).view(rho.shape[1:])
    fig, axes = figure(1, len(modes), width=3.3, height=3.4)
    for ax, (mode, forms) in zip(axes[0], modes.items(), strict=True):
        ax.pcolormesh(means, variances, kinds, cmap=ListedColormap(colours), vmin=0, vmax=2, rasterized=True)
        for form in forms:
            own = [run for run in runs if (run["mode"], run["form"] or "none") == (mode, form)]
            for layer in range(len(own[0]["mean"][0])):
                ax.plot(
                    [row[layer] for row in own[0]["mean"]],
                    [row[layer] for row in own[0]["variance"]],
                    color=_COLOURS[form],
                    lw=0.5,
                    alpha=0.4,
                )
            path = forms[form]["curves"]
            ax.plot(
                path["trace"],
                path["variance"],
                _STYLES[form],
                color=_COLOURS[form],
                lw=1.8,
                label=_LABELS[form],
            )
            ax.plot(path["trace"][-1], path["variance"][-1], "s", color=_COLOURS[form], ms=5)
            ax.plot(path["trace"][0], path["variance"][0], "o", color="black", ms=4, zorder=3)
            failed = [
                i for i, step in enumerate(path["plane_steps"]) if step in first_failures(forms[form], mode)
            ]
            ax.plot(path["trace"][failed], path["variance"][failed], "X", color="red", ms=7, zorder=4)
        ax.set(yscale="log", xlim=(-9, 9), ylim=(1e-5, 1e4), xlabel="d · eigenvalue mean", title=TITLES[mode])
    axes[0][0].set_ylabel("d · eigenvalue variance (symmetric part)")
    # The modes that are brought about have all lines.
    lines, labels = axes[0][-1].get_legend_handles_labels()
    regions = [Patch(color=colour) for colour in colours]
    fig.legend([*lines, *regions], [*labels, *names], loc="outside lower center", ncols=6, frameon=False)
    fig.suptitle(
        "Thick: mean over layers and seeds; thin: layers of one seed. Dot: start; square: end; red: first failure",
        fontsize=8,
    )
    save(fig, "failures_plane", opts)


def first_failures(form: Mapping[str, Any], mode: str) -> set[int]:
    """When the runs of one kind failed first by the criterion of their mode."""
    if mode == "healthy":
        return set()
    return {run[CRITERION[mode]]["first_failure"] for run in form["runs"]} - {None}


def draw_curves(modes: Mapping[str, Any], opts: Options) -> None:
    """Loss, the lowest entropy of a layer and the last layer's similarity over steps."""
    shown = {
        "loss": "training loss, nats",
        "lowest_entropy": "normalized entropy,\nlowest layer",
        "similarity": "token cosine,\nlast layer",
    }
    failed = [mode for mode in modes if mode != "healthy"]
    fig, axes = figure(len(failed), len(shown), width=3.1, height=2.3)
    reference = modes["healthy"]["none"]["curves"]
    for row, mode in enumerate(failed):
        for ax, (name, label) in zip(axes[row], shown.items(), strict=True):
            ax.plot(reference["steps"], reference[name], ":", color="0.4", label="healthy")
            for form, own in modes[mode].items():
                path = own["curves"]
                ax.plot(path["steps"], path[name], _STYLES[form], color=_COLOURS[form], label=_LABELS[form])
            if name != "loss":
                ax.set_ylim(-0.03, 1.03)
                ax.axhline(PEAKED if name == "lowest_entropy" else SIMILAR, color="red", lw=0.6)
            ax.set_ylabel(label)
            ax.set_title(TITLES[mode])
            if row == len(failed) - 1:
                ax.set_xlabel("optimizer steps")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(fig, "failures_curves", opts)


def main(argv: Sequence[str] | None = None) -> None:
    """Choose weights, compare, draw."""
    opts = options(__doc__.splitlines()[0], argv)
    clock = Clock()
    cache = opts.out / ".cache"
    data = opts.data or hub_copy(cache)
    size = opts.pick((200, 12, 10), (40, 6, 5))
    seeds = opts.pick(min(opts.seeds, 3), 2)
    failing_modes = opts.pick(("rank_mild", "entropy", "rank"), ("rank", "entropy"))
    rest = (*size, str(data), str(cache))
    weights = {(mode, form): WEIGHTS[1] for mode in CHOSEN_AT for form in FORMS}
    sweep: list[dict[str, Any]] = []
    if not opts.quick:
        grid = itertools.product(sorted(set(CHOSEN_AT.values())), FORMS, WEIGHTS)
        calls = [(mode, form, weight, CHOICE_SEED, *rest) for mode, form, weight in grid]
        sweep = in_parallel(work, calls, opts.jobs, "choice of weights")
        weights = chosen(sweep)
    calls = [("healthy", None, 0.0, seed, *rest) for seed in range(seeds)]
    for mode, seed in itertools.product(failing_modes, range(seeds)):
        calls.append((mode, None, 0.0, seed, *rest))
        calls += [(mode, form, weights[mode, form], seed, *rest) for form in FORMS]
    runs = in_parallel(work, calls, opts.jobs, "comparison")
    modes = compare(runs)
    draw_plane(modes, runs, opts)
    draw_curves(modes, opts)
    results = {
        "setting": {
            "model": f"Granite, {size[1]} layers, {HEADS} heads, d = {WIDTH}",
            "steps": size[0],
            "measured_every": size[2],
            "modes": MODES,
            "target": TARGET,
            "nu": NU,
            "criteria": {
                "rank": f"last layer's mean cosine > {SIMILAR}",
                "entropy": f"some layer's normalized entropy < {PEAKED}",
                "both": f"training loss at least {MARGIN} above that of the healthy run of the same seed",
                "judged_from_step": JUDGED_FROM,
            },
            "unigram_loss": runs[0]["unigram_loss"],
        },
        "choice": [
            {key: run[key] for key in ("mode", "form", "weight", "choice_loss", "test_loss")} for run in sweep
        ],
        "modes": modes,
    }
    write("failures", results, opts, clock)


if __name__ == "__main__":
    main()
