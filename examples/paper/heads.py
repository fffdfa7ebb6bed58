"""Does the theory hold in real heads: predicted signal propagation against the measured share of linear pairs.

    python examples/paper/heads.py [--quick]

What each network gave is kept in ``OUT/.cache/heads``: an interrupted call goes on. Delete it to run all again.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Clock, Options, cached, figure, in_parallel, interval, options, save, write
from material import encoder, hub_copy
from observe import LAGS, Observed, observe
from predict import independent, midpoints, scaled_moments, walk
from torch import Tensor, nn

_FORMAT = 1  # part of the cache's keys: raise it where the same arguments give other numbers
BINS = 16
LENGTH = 128
_POST_NORM = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 128, "do_layer_norm_before": False}
NETWORKS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": LENGTH},
    "llama": {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_size": 128,
        "intermediate_size": 512,
        "max_position_embeddings": LENGTH,
    },
    "paper": {
        "model_type": "opt",
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": LENGTH,
        **_POST_NORM,
    },
}
TITLES = {
    "gpt2": "GPT-2-like, 4 layers",
    "gpt2-fresh": "GPT-2-like, untrained",
    "llama": "Llama-like, 4 layers",
    "paper": "paper's (1 layer, 1 head)",
    "encoder": "all-MiniLM-L6-v2",
}
SPECTRUM = ("eig_mean", "eig_var", "sym_var", "concentration", "asymmetry")
BEHAVIOUR = ("linear_share", "entropy_normalized", "distance", "sink_rate")
OFFSETS = (0, 1, 2, 4, 8, 16, 32, 64)


def work(kind: str, seed: int, data: str, cache: str, encoder: str | None, quick: bool) -> dict[str, Any]:
    """Train one network (or load the encoder), observe it on test text and predict what its heads do."""
    how = [_FORMAT, NETWORKS.get(kind.removesuffix("-fresh")), kind, seed, LENGTH, BINS, quick]
    arguments = (kind, seed, Path(data), Path(cache), encoder, quick)
    return cached(Path(cache) / "heads", how, lambda: _work(*arguments))


def _work(kind: str, seed: int, data: Path, cache: Path, encoder: str | None, quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    sequences = 6 if quick else 24
    if encoder is not None:
        network, batches, perplexity = pretrained(encoder, data, sequences)
    else:
        network, batches, perplexity = trained(kind, seed, data, cache, sequences, quick)
    found = examine(network, observe(network, batches, bins=BINS))
    return {"kind": kind, "seed": seed, "perplexity": perplexity, **found}


def pretrained(folder: str, data: Path, sequences: int) -> tuple[nn.Module, list[dict[str, Tensor]], None]:
    """The encoder and long paragraphs of the test text, cut to one length so that there is no padding."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (data / "wikitext-2" / "test.txt").read_text(encoding="utf-8").splitlines()
    long = itertools.islice((line for line in lines if len(line.split()) >= LENGTH), sequences)
    ids = [
        tokenizer(line, truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"] for line in long
    ]
    return AutoModel.from_pretrained(folder), [{"input_ids": part} for part in torch.cat(ids).split(8)], None


def trained(
    kind: str, seed: int, data: Path, cache: Path, sequences: int, quick: bool
) -> tuple[nn.Module, list[dict[str, Tensor]], float]:
    """A small language model of words, trained on the validation text."""
    import lightning as L
    from material import words

    from lightning_qk import TransformerModule

    L.seed_everything(seed, verbose=False)
    corpus = words(data, cache, seed=seed, vocab_size=4000, block_size=LENGTH, batch_size=8)
    name = kind.removesuffix("-fresh")
    module = TransformerModule(NETWORKS[name], lr=1e-3, schedule="constant")
    trainer = L.Trainer(
        max_steps=40 if quick else 500,
        limit_val_batches=0,
        limit_test_batches=8 if quick else 64,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
    )
    if kind == name:
        trainer.fit(module, corpus)
    (tested,) = trainer.test(module, corpus, verbose=False)
    rows = (batch["input_ids"] for batch in corpus.test_dataloader())
    ids = torch.stack(list(itertools.islice(itertools.chain.from_iterable(rows), sequences)))
    return module.network, [{"input_ids": part} for part in ids.split(8)], tested["test/perplexity"]


def examine(network: nn.Module, observed: Observed) -> dict[str, Any]:
    """Columns of one value a head, curves over θ, and what the layers' tokens are like."""
    from lightning_qk import head_projections

    plain, folded = head_projections(network), head_projections(network, fold_norm=True)
    is_causal = observed.is_causal
    columns: dict[str, list[Tensor]] = {}
    curves: dict[str, list[Tensor]] = {}
    rotary: list[dict[str, Tensor]] = []
    growth = []
    for name, layer in plain.items():
        tokens = observed.tokens[name]
        growth.append(tokens.growth)
        moments = {
            "identity": scaled_moments(layer),
            "identity_folded": scaled_moments(folded[name]),
            "second_moment": scaled_moments(layer, tokens.second_moment),
            "covariance": scaled_moments(layer, tokens.covariance),
            "increments": scaled_moments(layer, tokens.increments),
        }
        predicted = {f"walk_{which}": walk(own, BINS, is_causal=is_causal) for which, own in moments.items()}
        predicted["walk_matched"] = walk(
            moments["covariance"], BINS, is_causal=is_causal, keys=LENGTH, matched=True
        )
        measured = observed.by_theta[name]
        values = {f"predicted/{which}": curve.mean(0) for which, curve in predicted.items()}
        values["predicted/independent"] = independent(
            layer, tokens.mean, tokens.covariance, keys=LENGTH, is_causal=is_causal
        )
        values["predicted/independent_unrotated"] = independent(
            layer, tokens.mean, tokens.covariance, keys=LENGTH, is_causal=is_causal, rotate_keys=False
        )
        identity = torch.eye(len(tokens.mean), dtype=torch.float64)
        values["predicted/independent_identity"] = independent(
            layer, torch.zeros_like(tokens.mean), identity, keys=LENGTH, is_causal=is_causal
        )
        values["predicted/walk_symmetric"] = walk(
            moments["identity"], BINS, is_causal=is_causal, symmetric=True
        ).nanmean(0)
        if layer.rotary is not None:
            turned = [
                scaled_moments(layer, offset=-round(float(1 - theta) * LENGTH), rotary=layer.rotary)
                for theta in midpoints(BINS)
            ]
            each = [walk(own, BINS, is_causal=is_causal)[index] for index, own in enumerate(turned)]
            values["predicted/walk_identity_rotated"] = torch.stack(each).mean(0)
            offsets = [scaled_moments(layer, offset=-one, rotary=layer.rotary) for one in OFFSETS]
            rotary.append(
                {
                    key: torch.stack([own[key] for own in offsets])
                    for key in ("trace", "trace_sq", "frobenius_sq")
                }
            )
        values["measured"] = measured.mean(0)
        # How much later keys pass more signal than earlier ones: what an eigenvalue mean that is not 0 brings.
        values["measured_late"] = (measured[BINS // 2 :].mean(0) - measured[: BINS // 2].mean(0)).double()
        late = predicted["walk_identity"]
        values["predicted_late"] = late[BINS // 2 :].mean(0) - late[: BINS // 2].mean(0)
        for which in ("identity", "covariance"):
            values.update({f"{which}/{key}": moments[which][key] for key in SPECTRUM})
            values[f"{which}/frobenius_sq"] = moments[which]["frobenius_sq"]
            values[f"{which}/trace_sq"] = moments[which]["trace_sq"]
        values.update({f"observed/{key}": observed.statistics[name][key].double() for key in BEHAVIOUR})
        for key, value in values.items():
            columns.setdefault(key, []).append(value)
        for key, curve in {
            "measured": measured,
            "walk_identity": predicted["walk_identity"],
            "walk_matched": predicted["walk_matched"],
        }.items():
            curves.setdefault(key, []).append(curve)
    return {
        "columns": {key: torch.cat(parts).tolist() for key, parts in columns.items()},
        "curves": {key: torch.cat(parts, -1).mT.tolist() for key, parts in curves.items()},
        "growth": growth,
        "rotary": {key: torch.cat([one[key] for one in rotary], -1).tolist() for key in rotary[0]}
        if rotary
        else {},
        "layers": len(plain),
        "folded": sum(layer.norm_folded for layer in folded.values()),
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the heads of one kind of network show, those of all seeds pooled."""
    columns = pooled(runs)
    measured = columns["measured"]
    predictors = {}
    for key, predicted in columns.items():
        if key.startswith("predicted/"):
            known = ~predicted.isnan()
            gap = (predicted - measured)[known]
            predictors[key.removeprefix("predicted/")] = {
                "heads": int(known.sum()),
                "range": [predicted[known].min(), predicted[known].max()],
                "spearman": correlation(predicted[known], measured[known]),
                "pearson": correlation(predicted[known], measured[known], ranks=False),
                "mean_abs_error": gap.abs().mean(),
                "bias": gap.mean(),
            }
    residual = measured - columns["predicted/walk_identity"]
    perplexities = [run["perplexity"] for run in runs if run["perplexity"] is not None]
    return {
        "seeds": [run["seed"] for run in runs],
        "heads": len(measured),
        "perplexity": interval(perplexities)._asdict() if len(perplexities) > 1 else perplexities,
        "measured": {"mean": measured.mean(), "min": measured.min(), "max": measured.max()},
        "norms_folded": f"{runs[0]['folded']} of {runs[0]['layers']} layers",
        "growth": {
            "lags": LAGS,
            "mean_over_layers": torch.tensor([run["growth"] for run in runs]).mean((0, 1)),
            "largest_of_a_layer": torch.tensor([run["growth"] for run in runs]).amax((0, 1)),
        },
        "predictors": predictors,
        "late_minus_early": {
            "measured": [columns["measured_late"].min(), columns["measured_late"].max()],
            "spearman": correlation(columns["predicted_late"], columns["measured_late"]),
        },
        "correlations": {
            which: {
                of: {
                    with_: correlation(columns[f"{which}/{of}"], columns[f"observed/{with_}"])
                    for with_ in BEHAVIOUR
                }
                for of in SPECTRUM
            }
            for which in ("identity", "covariance")
        },
        "asymmetry": {
            "mean": columns["identity/asymmetry"].mean(),
            "negative_eta": (columns["identity/trace_sq"] < 0).double().mean(),
            "with_residual_of_walk": correlation(columns["identity/asymmetry"], residual),
            "with_residual_of_independent": correlation(
                columns["identity/asymmetry"], measured - columns["predicted/independent"]
            ),
            "symmetric_formula_undefined": columns["predicted/walk_symmetric"].isnan().double().mean(),
            "symmetric_minus_full": (columns["predicted/walk_symmetric"] - columns["predicted/walk_identity"])
            .abs()
            .nanmean(),
        },
    }


def pooled(runs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Columns over the heads of all runs."""
    keys = runs[0]["columns"]
    return {
        key: torch.tensor([value for run in runs for value in run["columns"][key]], dtype=torch.float64)
        for key in keys
    }


def correlation(x: Tensor, y: Tensor, *, ranks: bool = True) -> list[float] | None:
    """Spearman's (or Pearson's) correlation over heads with its 95 % interval, by Fisher's z.

    For ranks with the variance (1 + r²/2)/(n − 3) (Bonett and Wright 2000). Heads count as independent. None for
    fewer than five heads or no spread beyond rounding.
    """
    from scipy import stats

    if len(x) < 5 or min(x.std(), y.std()) < 1e-12:
        return None
    function = stats.spearmanr if ranks else stats.pearsonr
    value = float(function(x.numpy(), y.numpy()).statistic)
    z = torch.atanh(torch.tensor(value).clamp(-1 + 1e-12, 1 - 1e-12))
    half = 1.959964 * ((1 + value**2 / 2 if ranks else 1.0) / (len(x) - 3)) ** 0.5
    return [value, float(torch.tanh(z - half)), float(torch.tanh(z + half))]


_SHOWN = {
    "walk_identity": "walk, Σ = I",
    "walk_covariance": "walk, Σ of inputs",
    "independent": "independent tokens",
}


def draw_propagation(groups: Mapping[str, Sequence[Mapping[str, Any]]], opts: Options) -> None:
    """Predicted against measured, a head a point."""
    fig, axes = figure(len(_SHOWN), len(groups), width=2.2, height=2.1)
    for column, (kind, runs) in enumerate(groups.items()):
        columns = pooled(runs)
        for row, (predictor, label) in enumerate(_SHOWN.items()):
            ax = axes[row][column]
            predicted = columns[f"predicted/{predictor}"]
            ax.plot([0, 1], [0, 1], color="0.6", lw=0.8, zorder=0)
            ax.scatter(
                predicted, columns["measured"], s=9, alpha=0.7, color=f"C{row}", marker="os^"[row], lw=0
            )
            found = correlation(predicted, columns["measured"])
            rank = "" if found is None else f"rank correlation {found[0]:.2f}"
            ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
            ax.set_title((TITLES[kind] + "\n" if row == 0 else "") + rank, fontsize=8)
            if column == 0:
                ax.set_ylabel("measured linear share")
            ax.set_xlabel(f"predicted, {label}", fontsize=8)
    fig.suptitle("Share of (query, key) pairs in the linear window, one point a head", fontsize=10)
    save(fig, "heads_propagation", opts)


def draw_theta(groups: Mapping[str, Sequence[Mapping[str, Any]]], opts: Options) -> None:
    """Over the key's position: the head whose curve the walk predicts best, the median one, the worst."""
    fig, axes = figure(len(groups), 3, width=2.6, height=1.9)
    theta = midpoints(BINS)
    for row, (kind, runs) in enumerate(groups.items()):
        curves = {
            key: torch.tensor([c for run in runs for c in run["curves"][key]]) for key in runs[0]["curves"]
        }
        order = (curves["measured"] - curves["walk_identity"]).abs().mean(1).argsort()
        places = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
        for column, (name, head) in enumerate(places.items()):
            ax = axes[row][column]
            ax.plot(theta, curves["measured"][head], "C0-o", ms=3, label="measured")
            ax.plot(theta, curves["walk_identity"][head], "C1--", label="walk, Σ = I")
            ax.plot(theta, curves["walk_matched"][head], "C4:", lw=2, label="walk, variance matched")
            alone = pooled(runs)["predicted/independent"][head]
            ax.axhline(float(alone), color="C2", ls="-.", lw=1.2, label="independent tokens")
            ax.set(ylim=(-0.03, 1.03), title=f"{TITLES[kind]}: {name} head")
            ax.title.set_fontsize(8)
            if row == len(groups) - 1:
                ax.set_xlabel("θ, relative position of the key")
            if column == 0:
                ax.set_ylabel("linear share ρ")
    fig.legend(
        *axes[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    save(fig, "heads_theta", opts)


def draw_correlation(models: Mapping[str, Mapping[str, Any]], opts: Options) -> None:
    """Rank correlations of spectra with what the heads do."""
    kinds = [kind for kind in models if kind not in ("paper", "gpt2-fresh")]
    fig, axes = figure(1, len(kinds), width=2.9, height=3.6)
    rows = [(which, of) for which in ("identity", "covariance") for of in SPECTRUM]
    for ax, kind in zip(axes[0], kinds, strict=True):
        table = models[kind]["correlations"]
        values = torch.tensor(
            [[(table[w][of][b] or [float("nan")])[0] for b in BEHAVIOUR] for w, of in rows],
            dtype=torch.float64,
        )
        picture = ax.imshow(values, cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
        for row, column in itertools.product(range(len(rows)), range(len(BEHAVIOUR))):
            value = float(values[row, column])
            if value == value:
                color = "white" if abs(value) > 0.7 else "black"
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
        ax.set_xticks(range(len(BEHAVIOUR)), [b.replace("_", "\n") for b in BEHAVIOUR], fontsize=7)
        is_first = kind == kinds[0]
        names = [f"{of}, Σ {'= I' if w == 'identity' else 'of inputs'}" for w, of in rows]
        ax.set_yticks(range(len(rows)), names if is_first else [""] * len(rows), fontsize=7)
        ax.set_title(f"{TITLES[kind]} ({models[kind]['heads']} heads)", fontsize=8)
        ax.spines[:].set_visible(False)
    fig.colorbar(picture, ax=axes[0][-1], label="Spearman's correlation over heads")
    save(fig, "heads_correlation", opts)


def draw_rotary(runs: Sequence[Mapping[str, Any]], opts: Options) -> None:
    """Moments of the form between a query and the key some positions before it."""
    fig, axes = figure(1, 3, width=2.7, height=2.4)
    names = {"trace": "trace ξ(Δ)", "trace_sq": "η(Δ), sum of λ²", "frobenius_sq": "F(Δ), squared norm"}
    for ax, (key, label) in zip(axes[0], names.items(), strict=True):
        for run in runs:
            ax.plot(OFFSETS, torch.tensor(run["rotary"][key]), color="C0", alpha=0.35, lw=0.8)
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xticks(OFFSETS, [str(one) for one in OFFSETS], fontsize=7)
        ax.minorticks_off()
        ax.axhline(0, color="0.6", lw=0.6)
        ax.set(xlabel="positions before the query", ylabel=label)
    fig.suptitle("Rotary heads (Llama-like): moments with the softmax scale, a line a head", fontsize=9)
    save(fig, "heads_rotary", opts)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, observe, compare, draw."""
    opts = options(__doc__.splitlines()[0], argv)
    clock = Clock()
    seeds = opts.pick({"gpt2": 3, "llama": 3, "gpt2-fresh": 1, "paper": 5}, {"gpt2": 1, "llama": 1})
    calls = [(kind, seed) for kind, count in seeds.items() for seed in range(count)]
    cache = opts.out / ".cache"
    data = opts.data or hub_copy(cache)
    runs_of = [(kind, seed, str(data), str(cache), None, opts.quick) for kind, seed in calls]
    runs_of.append(("encoder", 0, str(data), str(cache), encoder(), opts.quick))
    runs = in_parallel(work, runs_of, opts.jobs, "networks")
    groups = {kind: [run for run in runs if run["kind"] == kind] for kind in TITLES}
    groups = {kind: own for kind, own in groups.items() if own}
    models = {kind: summary(own) for kind, own in groups.items()}
    kept = ("measured", "predicted/walk_identity", "predicted/walk_covariance", "predicted/independent")
    heads = {
        kind: {key: [round(v, 4) for v in pooled(own)[key].tolist()] for key in kept}
        for kind, own in groups.items()
    }
    rotary = {
        key: {
            "offsets": OFFSETS,
            "median_over_heads": torch.tensor([run["rotary"][key] for run in groups["llama"]])
            .movedim(0, -1)
            .flatten(1)
            .median(-1)
            .values,
        }
        for key in ("trace", "trace_sq", "frobenius_sq")
    }
    draw_propagation(groups, opts)
    draw_theta({kind: own for kind, own in groups.items() if kind in ("gpt2", "llama", "encoder")}, opts)
    draw_correlation(models, opts)
    draw_rotary(groups["llama"], opts)
    write("heads", {"models": models, "heads": heads, "rotary": rotary}, opts, clock)


if __name__ == "__main__":
    main()
