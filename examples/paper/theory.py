"""Signal propagation probability: the formula against Monte Carlo of the random walk that it models.

Tokens are a Gaussian random walk and the query stands at the last position; a key passes signal where the
piecewise linear softmax of the query's row is neither at 0 nor at 1 (Bao et al., ICML 2024). The formula knows
three moments of W_QK; the simulation knows nothing but W_q, W_k and the walk.
"""

from itertools import pairwise
from typing import Any

import torch
from common import Clock, Options, figure, in_parallel, options, read, save, write
from torch import Tensor
from walks import D_MODEL, KINDS, THETAS, Head, count_hits, covariances, draw_head, effective_rank

from lightning_qk.functional import exact_signal_propagation_probability, signal_propagation_probability

BAR = 0.03
CHUNKS = 16  # of the draws, each with a seed of its own: results do not depend on the number of processes


def simulate(heads: list[Head], lengths: list[int], draws: int, opts: Options) -> Tensor:
    """Monte Carlo probabilities, ``(lengths, thetas, heads)``."""
    forms = torch.stack([head.form() for head in heads])
    calls = [(100 + chunk, draws // CHUNKS, forms, lengths) for chunk in range(CHUNKS)]
    return sum(in_parallel(count_hits, calls, opts.jobs, "walks")).double() / (draws // CHUNKS * CHUNKS)


def predict(heads: list[Head], lengths: list[int]) -> dict[str, Tensor]:
    """The formula, its form for finite T and the exact law, each ``(lengths, thetas, heads)``."""
    moments = [
        torch.stack(column).double() for column in zip(*(head.moments() for head in heads), strict=True)
    ]
    theta = torch.tensor(THETAS, dtype=torch.float64)
    limit = signal_propagation_probability(theta[:, None], *moments)
    finite = [signal_propagation_probability(theta[:, None], *moments, length=n) for n in lengths]
    exact = []
    for head in heads:
        query, key = head.query.double(), head.key.double()
        if head.sigma is not None:
            root = torch.linalg.cholesky(head.sigma.double())
            query, key = query @ root, key @ root
        laws = [
            exact_signal_propagation_probability(theta, query[None], key[None], length=n) for n in lengths
        ]
        exact.append(torch.stack(laws))
    return {
        "formula": limit.expand(len(lengths), -1, -1),
        "finite": torch.stack(finite),
        "exact": torch.cat(exact, -1),
    }


def predict_in_parallel(heads: list[Head], lengths: list[int], opts: Options) -> dict[str, Tensor]:
    """:func:`predict` by chunks of heads."""
    parts = [(heads[start : start + 200], lengths) for start in range(0, len(heads), 200)]
    found = in_parallel(predict, parts, opts.jobs, "laws")
    return {name: torch.cat([part[name] for part in found], -1) for name in found[0]}


def classify(rho: Tensor) -> list[str]:
    r"""Which phase a curve over :data:`THETAS`, the first axis, belongs to; shape ``(thetas, points)``.

    With ρ̄ the mean over θ, and those over the late (θ > ½) and the early half apart:

    - saturated: ρ̄ < ¼. Most pairs are at 0 or at 1 of the piecewise linear softmax.
    - localized: not saturated, and ρ̄_late and ρ̄_early differ by more than half of their sum.
    - uniform: what is left; the limit of no variance and no mean has ρ = ½ everywhere.
    """
    late, early, every = phase_means(rho)
    return [
        "saturated"
        if mean < 0.25
        else "localized"
        if abs(after - before) > 0.5 * (after + before)
        else "uniform"
        for after, before, mean in zip(late.tolist(), early.tolist(), every.tolist(), strict=True)
    ]


def phase_means(rho: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means over θ > ½, θ < ½ and all θ by the trapezoid rule on the grid's own places."""
    theta = torch.tensor(THETAS, dtype=rho.dtype)
    late, early = theta >= 0.5, theta <= 0.5

    def mean(keep: Tensor) -> Tensor:
        places = theta[keep]
        return torch.trapezoid(rho[keep], places, dim=0) / (places[-1] - places[0])

    return mean(late), mean(early), torch.trapezoid(rho, theta, dim=0) / (theta[-1] - theta[0])


def summary(difference: Tensor, error: Tensor) -> dict[str, float]:
    """Largest, root mean square and mean difference with the largest standard error among them."""
    return {
        "n": difference.numel(),
        "max": difference.abs().max(),
        "rms": difference.square().mean().sqrt(),
        "mean": difference.mean(),
        "largest_se": error.max(),
    }


def run(opts: Options) -> dict[str, Any]:
    """All heads of all groups against one set of walks."""
    traces = opts.pick([-1.0, 0.0, 1.0, 2.0, 4.0], [0.0, 1.0, 4.0])
    spreads = opts.pick([0.03, 0.1, 0.3, 1.0, 4.0], [0.1, 1.0])
    ranks = opts.pick([1, 2, 4, 8, 16, 32, 64], [1, 4, 16, 64])
    lengths = opts.pick([16, 32, 64, 128, 256, 512, 1024], [32, 128, 512])
    draws = opts.pick(40000, 8000)
    heads = [
        draw_head("grid", kind, rank, trace, spread, hash_seed(kind, rank, trace, spread, seed))
        for kind in KINDS
        for rank in ranks
        if rank > 1 or kind == "independent"  # one eigenvalue has no spread and nothing to rotate
        for trace in traces
        for spread in spreads
        for seed in range(opts.pick(opts.seeds, 2))
    ]
    heads += [
        draw_head(name, kind, rank, trace, spread, hash_seed(name, kind, rank, trace, spread), sigma)
        for name, sigma in covariances().items()
        for kind in KINDS
        for rank in (16, 64)
        for trace in (0.0, 2.0)
        for spread in (0.1, 1.0)
    ]
    means, variances = phase_axes(opts.pick((13, 9), (5, 5)))
    heads += [
        draw_head(
            "phase", "symmetric", D_MODEL, mean * D_MODEL, variance * D_MODEL, hash_seed(mean, variance)
        )
        for variance in variances
        for mean in means
    ]
    measured = simulate(heads, lengths, draws, opts)
    predicted = predict_in_parallel(heads, lengths, opts)
    error = (measured * (1 - measured) / draws).sqrt()
    results = {
        "setting": {
            "d_model": D_MODEL,
            "draws": draws,
            "heads": len(heads),
            "weights_per_cell": opts.pick(opts.seeds, 2),
            "traces": traces,
            "spreads": spreads,
            "d_heads": ranks,
            "lengths": lengths,
            "thetas": THETAS,
            "bar": BAR,
        },
        **compare(heads, lengths, {name: one - measured for name, one in predicted.items()}, error),
        "curves": curves(heads, lengths.index(512), measured, predicted, error, opts),
        "phase": phase(heads, means, variances, measured[lengths.index(512)], predicted["formula"][0]),
    }
    return results


def hash_seed(*parts: Any) -> int:
    """The same seed for the same cell in every process (Python's own hash is salted)."""
    import zlib

    return zlib.crc32(repr(parts).encode())


def compare(
    heads: list[Head], lengths: list[int], differences: dict[str, Tensor], error: Tensor
) -> dict[str, Any]:
    """Differences from Monte Carlo: where the bar is asked for, and everywhere by cell."""
    ranks = sorted({head.d_head for head in heads if head.group == "grid"})

    def pick(group: str, kind: str | None = None, rank: tuple[int, int] = (1, D_MODEL)) -> Tensor:
        return torch.tensor(
            [h.group == group and kind in (None, h.kind) and rank[0] <= h.d_head <= rank[1] for h in heads]
        )

    long = torch.tensor([length >= 512 for length in lengths])
    wide = pick("grid", rank=(16, D_MODEL))

    def forms(rows: Tensor, columns: Tensor) -> dict[str, Any]:
        return {
            name: summary(one[rows][:, :, columns], error[rows][:, :, columns])
            for name, one in differences.items()
        }

    def largest(columns: Tensor) -> float:
        return float(differences["formula"][long][:, :, columns].abs().max())

    at_bar = differences["formula"][long][:, :, wide]
    length, theta, column = (int(i) for i in torch.unravel_index(at_bar.abs().argmax(), at_bar.shape))
    worst = [h for h, keep in zip(heads, wide.tolist(), strict=True) if keep][column]
    rows = {n: torch.tensor(lengths) == n for n in lengths}
    cells = [
        {"kind": kind, "d_head": rank, "length": n, **forms(rows[n], pick("grid", kind, (rank, rank)))}
        for kind in KINDS
        for rank in ranks
        if rank > 1 or kind == "independent"
        for n in lengths
    ]
    traces = sorted({h.trace for h in heads if h.group == "grid"})
    effective = torch.tensor([effective_rank(h) for h in heads])
    return {
        "bar": {
            **forms(long, wide),
            "holds_formula": bool(at_bar.abs().max() <= BAR),
            "holds_exact": bool(differences["exact"].abs().max() <= BAR),
            "share_within": (at_bar.abs() <= BAR).double().mean(),
            "worst": {
                "kind": worst.kind,
                "d_head": worst.d_head,
                "trace": worst.trace,
                "spread": worst.spread,
                "theta": THETAS[theta],
                "length": [n for n in lengths if n >= 512][length],
                "difference": at_bar[length, theta, column],
            },
            "largest_by_d_head_and_trace": {
                rank: {
                    trace: largest(
                        pick("grid", rank=(rank, rank)) & torch.tensor([h.trace == trace for h in heads])
                    )
                    for trace in traces
                }
                for rank in ranks
                if rank >= 16
            },
        },
        "everywhere": forms(torch.ones(len(lengths), dtype=torch.bool), pick("grid")),
        "cells": cells,
        "by_length_full_rank": {n: forms(rows[n], pick("grid", rank=(D_MODEL, D_MODEL))) for n in lengths},
        "by_d_head": {rank: forms(long, pick("grid", rank=(rank, rank))) for rank in ranks},
        "by_effective_rank": [
            {"from": low, "to": high, **forms(long, chosen)}
            for low, high in pairwise([1, 2, 4, 8, 12, 16, 24, 32, 48, 64.1])
            if (chosen := pick("grid") & (effective >= low - 1e-4) & (effective < high - 1e-4)).any()
        ],
        "sigma": {
            name: {rank: forms(long, pick(name, rank=(rank, rank))) for rank in (16, D_MODEL)}
            for name in covariances()
        },
    }


def curves(
    heads: list[Head],
    row: int,
    measured: Tensor,
    predicted: dict[str, Tensor],
    error: Tensor,
    opts: Options,
) -> list[dict[str, Any]]:
    """Curves over θ at T = 512 of the first head of some cells."""
    shown = opts.pick([(0.0, 0.1), (0.0, 4.0), (1.0, 0.1), (4.0, 1.0)], [(0.0, 0.1), (1.0, 0.1), (4.0, 1.0)])
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for column, head in enumerate(heads):
        cell = (head.kind, head.d_head, head.trace, head.spread)
        if head.group != "grid" or head.d_head not in (16, D_MODEL) or cell[2:] not in shown or cell in found:
            continue
        trace, trace_sq, frobenius_sq = head.moments()
        found[cell] = {
            **{"kind": head.kind, "d_head": head.d_head, "trace_asked": head.trace, "spread": head.spread},
            **{"trace": trace, "trace_sq": trace_sq, "frobenius_sq": frobenius_sq},
            "monte_carlo": measured[row, :, column],
            "half_width": 1.96 * error[row, :, column],
            "formula": predicted["formula"][row, :, column],
            "exact": predicted["exact"][row, :, column],
        }
    return list(found.values())


def phase_axes(sizes: tuple[int, int]) -> tuple[list[float], list[float]]:
    """Eigenvalue means and variances of the phase diagram, over the d_model eigenvalues."""
    means = torch.linspace(-6, 6, sizes[0], dtype=torch.float64) / D_MODEL
    variances = torch.logspace(-3, 2, sizes[1], dtype=torch.float64) / D_MODEL
    return means.tolist(), variances.tolist()


def phase(
    heads: list[Head], means: list[float], variances: list[float], measured: Tensor, limit: Tensor
) -> dict[str, Any]:
    """Phases of the points by Monte Carlo and by the formula."""
    columns = [i for i, head in enumerate(heads) if head.group == "phase"]
    simulated, predicted = classify(measured[:, columns]), classify(limit[:, columns])
    places = [(mean, variance) for variance in variances for mean in means]
    points = [
        {"mean": mean, "variance": variance, "monte_carlo": one, "formula": other}
        for (mean, variance), one, other in zip(places, simulated, predicted, strict=True)
    ]
    return {
        "points": points,
        "n": len(points),
        "agree": sum(p["monte_carlo"] == p["formula"] for p in points),
    }


def symmetric_map(means: Tensor, variances: Tensor) -> Tensor:
    """The formula for symmetric full-rank heads over a plane, ``(thetas, variances, means)``."""
    trace = means[None] * D_MODEL
    squares = D_MODEL * (variances[:, None] + means[None].square())
    theta = torch.tensor(THETAS, dtype=torch.float64)[:, None, None]
    return signal_propagation_probability(theta, trace.expand_as(squares), squares, squares)


def draw_curves(results: dict[str, Any], opts: Options) -> None:
    """Formula as lines, Monte Carlo as points with 95 % intervals."""
    ranks = [16, D_MODEL]
    fig, axes = figure(len(ranks), len(KINDS), width=2.2, height=2.0)
    styles = {}
    for line in results["curves"]:
        ax = axes[ranks.index(line["d_head"])][KINDS.index(line["kind"])]
        cell = (line["trace_asked"], line["spread"])
        index = styles.setdefault(cell, len(styles))
        label = rf"$\xi={cell[0]:g}$, spread {cell[1]:g}"
        ax.plot(
            THETAS, line["formula"], color=f"C{index}", linestyle=["-", "--", ":", "-."][index], label=label
        )
        ax.errorbar(
            THETAS,
            line["monte_carlo"],
            line["half_width"],
            color=f"C{index}",
            fmt="os^D"[index],
            markersize=3,
        )
    for row, rank in enumerate(ranks):
        for column, kind in enumerate(KINDS):
            axes[row][column].set(ylim=(-0.03, 1.03))
            axes[row][column].set_title(f"{kind}, d_head {rank}", fontsize=9)
            axes[row][column].set_xlabel("θ = key position / T")
        axes[row][0].set_ylabel("propagation probability")
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    fig.suptitle("Formula (lines) and Monte Carlo of the walk (points, 95 % intervals), T = 512")
    save(fig, "theory_propagation", opts)


def draw_break(results: dict[str, Any], opts: Options) -> None:
    """Largest difference against length and against d_head."""
    fig, axes = figure(1, 3, width=3.4, height=3.0)
    lengths, ranks = results["setting"]["lengths"], results["setting"]["d_heads"]
    for index, (name, label) in enumerate(
        [("formula", "formula"), ("finite", "formula, finite T"), ("exact", "exact law")]
    ):
        style = {
            "color": f"C{index}",
            "marker": "os^"[index],
            "linestyle": ["-", "--", ":"][index],
            "label": label,
        }
        axes[0][0].plot(
            lengths, [results["by_length_full_rank"][str(n)][name]["max"] for n in lengths], **style
        )
        axes[0][1].plot(ranks, [results["by_d_head"][str(n)][name]["max"] for n in ranks], **style)
    axes[0][0].set(
        title=f"d_head = {D_MODEL}", xlabel="length T", ylabel="largest difference from Monte Carlo"
    )

    axes[0][1].set(title="T ≥ 512", xlabel="d_head")
    for ax, places in zip(axes[0], (lengths, ranks), strict=False):
        ax.axhline(BAR, color="0.5", linewidth=0.8)
        ax.set(xscale="log", yscale="log")
        ax.set_xticks(places, places)
        ax.set_xticks([], minor=True)
        ax.text(places[0], BAR * 0.97, f"{BAR}", ha="left", va="top", color="0.4")
        ax.set_ylim(0.004, 0.8)
        ax.legend(frameon=False, fontsize=8, loc="upper right")
    table = torch.zeros(len(ranks), len(lengths))
    for cell in results["cells"]:
        at = ranks.index(cell["d_head"]), lengths.index(cell["length"])
        table[at] = max(table[at], float(cell["formula"]["max"]))
    image = axes[0][2].imshow(table.numpy(), origin="lower", aspect="auto", cmap="cividis", vmin=0)
    for (row, column), value in zip(
        torch.cartesian_prod(*map(torch.arange, table.shape)), table.flatten(), strict=True
    ):
        axes[0][2].text(
            column, row, f"{value:.2f}"[1:], ha="center", va="center", fontsize=7,
            color="white" if value < table.max() / 2 else "black",
        )  # fmt: skip
    axes[0][2].set_xticks(range(len(lengths)), lengths)
    axes[0][2].set_yticks(range(len(ranks)), ranks)
    axes[0][2].set(title="formula, all kinds of heads", xlabel="length T", ylabel="d_head")
    fig.colorbar(image, ax=axes[0][2], label="largest difference")
    fig.suptitle("Where the formula breaks: short sequences and low rank")
    save(fig, "theory_break", opts)


def draw_phase(results: dict[str, Any], opts: Options) -> None:
    """Regions by the formula, Monte Carlo points on top."""
    from matplotlib.colors import ListedColormap

    names = ["uniform", "localized", "saturated"]
    colours = ["#dce9f5", "#ffd9b0", "#d9d9d9"]
    means = torch.linspace(-6.5, 6.5, 201, dtype=torch.float64)
    variances = torch.logspace(-3.3, 2.3, 161, dtype=torch.float64)
    rho = symmetric_map(means / D_MODEL, variances / D_MODEL)
    kinds = torch.tensor([names.index(kind) for kind in classify(rho.flatten(1))]).view(rho.shape[1:])
    fig, axes = figure(1, 1, width=6.0, height=4.6)
    ax = axes[0][0]
    ax.pcolormesh(
        means.numpy(),
        variances.numpy(),
        kinds.numpy(),
        cmap=ListedColormap(colours),
        vmin=0,
        vmax=2,
        rasterized=True,
    )
    for index, (name, marker) in enumerate(zip(names, "osX", strict=True)):
        points = [p for p in results["phase"]["points"] if p["monte_carlo"] == name]
        ax.plot(
            [p["mean"] * D_MODEL for p in points], [p["variance"] * D_MODEL for p in points],
            marker, color=["C0", "C1", "0.35"][index], markersize=5, label=f"{name} (Monte Carlo)",
        )  # fmt: skip
    off = [p for p in results["phase"]["points"] if p["monte_carlo"] != p["formula"]]
    ax.plot(
        [p["mean"] * D_MODEL for p in off], [p["variance"] * D_MODEL for p in off],
        "o", color="red", fillstyle="none", markersize=11, label="formula differs",
    )  # fmt: skip
    ax.set(
        yscale="log", xlabel="d · eigenvalue mean (= ξ, trace of s·W_QK)", ylabel="d · eigenvalue variance"
    )
    fig.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    ax.set_title(
        "Phases of symmetric full-rank heads, d = 64: regions by the formula,\n"
        f"points by simulation at T = 512 ({results['phase']['agree']} of {results['phase']['n']} agree)"
    )
    save(fig, "theory_phase", opts)


def main(argv: list[str] | None = None) -> None:
    """Run, write and draw."""
    opts = options(__doc__.splitlines()[0], argv)
    clock = Clock()
    torch.set_num_threads(1)
    write("theory", run(opts), opts, clock)
    results = read("theory", opts.out)  # figures show what the file holds
    draw_curves(results, opts)
    draw_break(results, opts)
    draw_phase(results, opts)
    print({name: round(float(results["bar"][name]["max"]), 4) for name in ("formula", "finite", "exact")})


if __name__ == "__main__":
    main()
