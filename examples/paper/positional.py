"""Positional and semantic attention: a model with a transition between them, and a measure for real heads.

The solvable model is that of Cui, Behrens, Krzakala and Zdeborová 2024 (arXiv 2402.03902): tied low-rank
dot-product attention on two tokens learns, from few samples, to attend by position, and from many by content.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from asymptotics import STARTS, Task, normal_points, solve
from common import Clock, Options, figure, in_parallel, interval, options, read, save, write
from torch import Tensor, nn

from lightning_qk.capture.capture import AttentionCapture
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional import positional_share
from lightning_qk.heads.reader import find_attention

# Where the losses of the two minima cross for infinite d, in the authors' released code: their list of crossings
# has 1.241 for ω = 0.3, and their tables of the two solutions' free energies cross at 1.262 by interpolation.
AUTHORS = {"listed": 1.241, "tables": 1.262}
BLOCK, SEQUENCES = 128, 16


@dataclass(frozen=True)
class Model:
    """The setting of the solvable model, its authors' values.

    Attributes:
        d: width of a token.
        omega: weight of the positional part of the target.
        sigma: standard deviation of the tokens' coordinates.
        decay: λ, of the penalty ``λ/2 ‖Q‖²``.
        mixing: A, the positional part of the target, row by row.
        rate, momentum, steps: of gradient descent. The authors' are 0.15, none and 5,000; with momentum it is
            nearer to the minima in fewer steps, which :func:`against_plain_descent` checks.
        values_with_positions: whether the student's values carry the positional encodings, as its queries do.
    """

    d: int = 1000
    omega: float = 0.3
    sigma: float = 0.5
    decay: float = 0.01
    mixing: tuple[tuple[float, float], tuple[float, float]] = ((0.6, 0.4), (0.4, 0.6))
    rate: float = 0.15
    momentum: float = 0.9
    steps: int = 1200
    values_with_positions: bool = True


class Sample:
    """Draws of the task, and what the loss needs of them.

    Tokens ``x`` of n samples are Gaussian, ``(n, 2, d)``; position encodings are ``p = (1, −1) / √d`` in every
    coordinate. The target is ``[(1 − ω) softmax(z zᵀ) + ω A] x`` with ``z = x Q⋆ / √d``, the student
    ``softmax(h hᵀ) (x + p)`` with ``h = (x + p) Q / √d``. With two tokens a row of the student's attention is one
    number, a = σ(h₁² − h₁h₂) for the first token, and the row's squared error a parabola in it.
    """

    def __init__(self, model: Model, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = model
        self.star = torch.randn(model.d, generator=generator)
        x = model.sigma * torch.randn(n, 2, model.d, generator=generator)
        encoding = torch.tensor([[1.0], [-1.0]]) / model.d**0.5
        z = x @ self.star / model.d**0.5
        weights = (1 - model.omega) * torch.softmax(z[:, :, None] * z[:, None], -1)
        target = (weights + model.omega * torch.tensor(model.mixing)) @ x
        self.tokens = (x + encoding).transpose(0, 1).contiguous()  # (2, n, d)
        values = x + encoding if model.values_with_positions else x
        apart = values[:, 0] - values[:, 1]
        self.square = (apart * apart).sum(-1, dtype=torch.float64)[:, None]
        # Each row's error is |away|² + 2 a (away·±apart) + a² |apart|², away from where a = 0 would put it.
        away = [values[:, 1] - target[:, 0], values[:, 0] - target[:, 1]]
        self.constant = [(one * one).sum(-1, dtype=torch.float64)[:, None] for one in away]
        signs = (1.0, -1.0)
        self.linear = [
            (sign * one * apart).sum(-1, dtype=torch.float64)[:, None]
            for sign, one in zip(signs, away, strict=True)
        ]

    def project(self, weights: Tensor) -> Tensor:
        """``h`` of every sample under some columns of weights, ``(2, n, columns)``."""
        return torch.stack([one @ weights for one in self.tokens]) / self.model.d**0.5

    def loss(self, weights: Tensor, used: Tensor) -> Tensor:
        """``Σ ‖error‖² / (2 d) + λ/2 ‖Q‖²`` of each column over its samples, in float64.

        Args:
            weights: ``(d, columns)``.
            used: 1 where a column uses a sample, ``(n, columns)``.
        """
        h = self.project(weights).double()
        total = torch.zeros(weights.shape[1], dtype=torch.float64)
        for row in (0, 1):
            a = torch.sigmoid(h[row] * (h[row] - h[1 - row]))
            errors = self.constant[row] + 2 * a * self.linear[row] + a.square() * self.square
            total += (errors * used).sum(0)
        return total / (2 * self.model.d) + self.model.decay / 2 * weights.double().square().sum(0)

    def gradient(self, weights: Tensor, used: Tensor) -> Tensor:
        """Gradient of :meth:`loss`, ``(d, columns)``."""
        h = self.project(weights)
        toward = torch.zeros_like(h)
        for row in (0, 1):
            own, other = h[row], h[1 - row]
            a = torch.sigmoid(own * (own - other))
            slope = (self.linear[row].float() + a * self.square.float()) * a * (1 - a) * used
            toward[row] += slope * (2 * own - other)
            toward[1 - row] -= slope * own
        found = sum(tokens.T @ one for tokens, one in zip(self.tokens, toward, strict=True))
        return found / self.model.d**1.5 + self.model.decay * weights


def descend(sample: Sample, alphas: Sequence[float]) -> dict[str, dict[str, list[float]]]:
    """Gradient descent from both starts, for all sample complexities at once: each uses the first α d samples.

    Returns:
        Start → what → by α: ``loss`` (over d), ``theta`` = abs(Q⋆ᵀ Q) / d, ``m`` = abs(1ᵀ Q) / d and
        ``gradient``, its norm over that of λ Q.
    """
    model, n = sample.model, sample.tokens.shape[1]
    starts = {"positional": torch.ones(model.d) / model.d**0.5, "semantic": sample.star}
    weights = torch.stack([start for start in starts.values() for _ in alphas], 1)
    counts = torch.tensor([round(alpha * model.d) for alpha in alphas]).repeat(len(starts))
    used = (torch.arange(n)[:, None] < counts).float()
    velocity = torch.zeros_like(weights)
    for _ in range(model.steps):
        velocity = model.momentum * velocity + sample.gradient(weights, used)
        weights -= model.rate * velocity
    left = sample.gradient(weights, used).norm(dim=0) / (model.decay * weights.norm(dim=0))
    found = {
        "loss": sample.loss(weights, used) / model.d,
        "theta": (sample.star @ weights).abs() / model.d,
        "m": weights.sum(0).abs() / model.d,
        "gradient": left,
    }
    size = len(alphas)
    return {
        start: {what: value[place * size : (place + 1) * size].tolist() for what, value in found.items()}
        for place, start in enumerate(starts)
    }


def run_seed(model: Model, alphas: Sequence[float], seed: int) -> dict[str, dict[str, list[float]]]:
    """One draw of the task."""
    torch.set_num_threads(1)
    sample = Sample(model, round(max(alphas) * model.d), 1000 * model.d + seed)
    return descend(sample, alphas)


def crossing(alphas: Sequence[float], differences: Sequence[float]) -> float | None:
    """Where positional − semantic loss turns positive for good, by linear interpolation; None if it does not."""
    below = [place for place, value in enumerate(differences) if value <= 0]
    if not below or below[-1] + 1 == len(alphas):
        return None
    last = below[-1]
    low, high = differences[last], differences[last + 1]
    return alphas[last] + (alphas[last + 1] - alphas[last]) * -low / (high - low)


def transition(opts: Options) -> dict[str, Any]:
    """Both minima against sample complexity, for several d."""
    alphas = opts.pick([0.6, 0.8, 0.95, 1.1, 1.2, 1.3, 1.4, 1.55, 1.75, 2.0], [0.8, 1.1, 1.4, 1.7, 2.0])
    small, middle = Model(d=250, steps=opts.pick(1200, 600)), Model(d=500)
    variants = [(small, opts.pick(8 * opts.seeds, 6))]
    if not opts.quick:
        variants += [(middle, 4 * opts.seeds), (Model(), 2 * opts.seeds)]
        variants += [(replace(middle, values_with_positions=False), 4 * opts.seeds)]
    calls = [(model, alphas, seed) for model, seeds in variants for seed in range(seeds)]
    done = in_parallel(run_seed, calls, opts.jobs, "draws")
    runs = {(model, seed): one for (model, _, seed), one in zip(calls, done, strict=True)}
    return {
        "alphas": alphas,
        "authors_crossing": AUTHORS,
        "infinite_width": infinite_width(alphas, opts),
        "variants": [
            {
                "model": asdict(model),
                "seeds": seeds,
                **summarize(alphas, [runs[model, seed] for seed in range(seeds)]),
            }
            for model, seeds in variants
        ],
        "against_plain_descent": None if opts.quick else against_plain_descent(small, alphas, runs, opts),
    }


def law(model: Model, alpha: float, power: int, draw: int) -> dict[str, dict[str, float]]:
    """Both minima for d → ∞."""
    torch.set_num_threads(1)
    task = Task(model.omega, model.sigma, model.decay, model.mixing)
    points = normal_points(power, draw)
    return {name: solve(task, alpha, start, points) for name, start in STARTS.items()}


def infinite_width(alphas: Sequence[float], opts: Options) -> dict[str, Any]:
    """Both minima for d → ∞ by α, and where they cross by several sets of integration points."""
    model, power = Model(), opts.pick(12, 10)
    near, draws = (1.15, 1.35), opts.pick(5, 2)
    calls = [(model, alpha, power, 0) for alpha in alphas]
    calls += [(model, alpha, power, draw) for draw in range(draws) for alpha in near]
    found = in_parallel(law, calls, opts.jobs, "laws")
    gaps = [one["positional"]["loss"] - one["semantic"]["loss"] for one in found[len(alphas) :]]
    crossings = [crossing(near, gaps[2 * draw : 2 * draw + 2]) for draw in range(draws)]
    return {
        "points": 2**power,
        **{
            start: {
                what: [one[start][what] for one in found[: len(alphas)]] for what in ("loss", "theta", "m")
            }
            for start in STARTS
        },
        "crossing": interval([one for one in crossings if one is not None]),
        "largest_change": max(one[start]["change"] for one in found for start in STARTS),
    }


def against_plain_descent(
    model: Model, alphas: Sequence[float], runs: dict[Any, Any], opts: Options
) -> dict[str, Any]:
    """The first draws again with the authors' descent: no momentum, 5,000 steps."""
    plain_model = replace(model, momentum=0.0, steps=5000)
    calls = [(plain_model, alphas, seed) for seed in range(opts.seeds)]
    again = in_parallel(run_seed, calls, opts.jobs, "plain descent")
    excess, moved = [], []
    for seed, plain_run in enumerate(again):
        run = runs[model, seed]
        for start in run:
            losses = zip(plain_run[start]["loss"], run[start]["loss"], strict=True)
            excess += [(one - other) / other for one, other in losses]
        pair = [
            crossing(
                alphas,
                [p - s for p, s in zip(one["positional"]["loss"], one["semantic"]["loss"], strict=True)],
            )
            for one in (plain_run, run)
        ]
        if None not in pair:
            moved.append(abs(pair[0] - pair[1]))
    return {
        "draws": opts.seeds,
        "relative_excess_of_plain_loss": {"median": sorted(excess)[len(excess) // 2], "max": max(excess)},
        "lowest_relative_excess": min(excess),
        "largest_move_of_a_crossing": max(moved, default=None),
    }


def summarize(alphas: Sequence[float], runs: list[dict[str, dict[str, list[float]]]]) -> dict[str, Any]:
    """Means with intervals over seeds."""
    by_start = {
        start: {
            what: [interval(run[start][what][place] for run in runs) for place in range(len(alphas))]
            for what in ("loss", "theta", "m")
        }
        for start in runs[0]
    }
    paired = [
        [p - s for p, s in zip(run["positional"]["loss"], run["semantic"]["loss"], strict=True)]
        for run in runs
    ]
    found = [crossing(alphas, one) for one in paired]
    known = [one for one in found if one is not None]
    mean = [sum(column) / len(column) for column in zip(*paired, strict=True)]
    return {
        **by_start,
        "difference": [interval(column) for column in zip(*paired, strict=True)],
        "crossing": interval(known) if len(known) > 1 else None,
        "crossing_of_mean": crossing(alphas, mean),
        "without_crossing": len(found) - len(known),
        "largest_gradient": max(max(run[start]["gradient"]) for run in runs for start in run),
    }


def text_batches(opts: Options, path: str, count: int) -> list[Tensor]:
    """WikiText-2 in the encoder's tokens, between its own first and last one, ``(SEQUENCES, BLOCK)`` each."""
    from material import hub_copy

    from lightning_qk import TextDataModule

    cache = opts.out / ".cache"
    folder = (opts.data or hub_copy(cache)) / "wikitext-2"
    data = TextDataModule(
        str(folder / "valid.txt"),
        "causal_lm",
        path,
        block_size=BLOCK - 2,
        batch_size=SEQUENCES,
        cache_dir=str(cache),
    )
    data.prepare_data()
    data.setup("fit")
    tokenizer = data.tokenizer
    batches = []
    for batch in islice(data.train_dataloader(), count):
        blocks = batch["input_ids"]
        first = torch.full((len(blocks), 1), tokenizer.cls_token_id)
        last = torch.full((len(blocks), 1), tokenizer.sep_token_id)
        batches.append(torch.cat([first, blocks, last], 1))
    return batches


def shuffled(batch: Tensor, seed: int) -> Tensor:
    """The same tokens in another order in each sequence; the first and the last stay."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(len(batch), batch.shape[1] - 2, generator=generator).argsort(1)
    return torch.cat([batch[:, :1], batch[:, 1:-1].gather(1, order), batch[:, -1:]], 1)


@torch.no_grad()
def shares(network: nn.Module, batch: Tensor) -> Tensor:
    """The positional share of every head on a batch of token ids, ``(layers, heads)``."""
    modules = find_attention(network)
    found: dict[str, Tensor] = {}

    def hear(name: str, call: CapturedCall) -> None:
        found[name] = positional_share(call.logits(self_attention=True))

    capture = AttentionCapture({module: name for name, module in modules.items()}, hear, model=network)
    network.eval()
    capture.install()
    try:
        capture.enabled = True
        network(input_ids=batch)
    finally:
        capture.remove()
    if capture.problems:
        raise RuntimeError(f"expected calls that can be read, got {capture.problems}")
    return torch.stack([found[name] for name in modules])


def real_heads(opts: Options) -> dict[str, Any]:
    """The measure on the pretrained encoder: on text, on shuffled text, and before any training."""
    from material import encoder
    from scipy.stats import spearmanr
    from transformers import AutoConfig, AutoModel

    count = opts.pick(max(opts.seeds, 5), 2)
    path = encoder()
    batches = text_batches(opts, path, count)
    trained = AutoModel.from_pretrained(path)
    found = {"text": [], "shuffled": [], "random": []}
    for seed, batch in enumerate(batches):
        found["text"].append(shares(trained, batch))
        found["shuffled"].append(shares(trained, shuffled(batch, seed)))
        torch.manual_seed(seed)
        found["random"].append(shares(AutoModel.from_config(AutoConfig.from_pretrained(path)), batch))
    by_case = {case: torch.stack(values).double() for case, values in found.items()}
    gaps = by_case["text"] - by_case["random"]
    return {
        "model": "all-MiniLM-L6-v2",
        "sequences": SEQUENCES,
        "tokens": BLOCK,
        "batches": count,
        "chance": (2 * BLOCK - 2) / (SEQUENCES * BLOCK * (BLOCK - 1)),
        "mean_by_head": {case: values.mean(0) for case, values in by_case.items()},
        "mean": {case: interval(values.mean((1, 2))) for case, values in by_case.items()},
        "by_layer": {
            case: [interval(values[:, layer].mean(1)) for layer in range(values.shape[1])]
            for case, values in by_case.items()
        },
        "text_over_random": interval(gaps.mean((1, 2))),
        "heads_above_half": {case: int((values.mean(0) > 0.5).sum()) for case, values in by_case.items()},
        "heads": by_case["text"][0].numel(),
        "largest_head": {case: float(values.mean(0).max()) for case, values in by_case.items()},
        "largest_spread_over_batches": float(by_case["text"].std(0).max()),
        "rank_correlation_text_shuffled": float(
            spearmanr(by_case["text"].mean(0).flatten(), by_case["shuffled"].mean(0).flatten()).statistic
        ),
    }


def bars(values: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """Means, and the lengths of the intervals below and above."""
    means = [mean for mean, _, _ in values]
    return means, [[mean - low for mean, low, _ in values], [high - mean for mean, _, high in values]]


def draw_transition(results: dict[str, Any], opts: Options) -> None:
    """Losses and order parameters against sample complexity, and the crossing against d."""
    found = results["transition"]
    alphas, variants, law_found = found["alphas"], found["variants"], found["infinite_width"]
    own = [one for one in variants if one["model"]["values_with_positions"]]
    fig, axes = figure(2, 2, width=4.2, height=3.0)
    loss, cross, theta, m = axes.flatten()
    for index, one in enumerate(own):
        mean, lengths = bars([[1e3 * x for x in value] for value in one["difference"]])
        label = f"d = {one['model']['d']}, {one['seeds']} seeds"
        style = {"color": f"C{index}", "marker": "os^"[index], "markersize": 3, "linewidth": 1}
        loss.errorbar(alphas, mean, lengths, label=label, **style)
    gaps = [
        1e3 * (p - s)
        for p, s in zip(law_found["positional"]["loss"], law_found["semantic"]["loss"], strict=True)
    ]
    loss.plot(alphas, gaps, color="black", linestyle="--", linewidth=1, label="d → ∞")
    loss.axhline(0, color="0.5", linewidth=0.8)
    loss.set(ylabel="positional − semantic loss, 10⁻³ d", title="training loss")
    largest = own[-1]
    for ax, what, name in ((theta, "theta", "θ = |Q⋆ᵀQ| / d"), (m, "m", "m = |1ᵀQ| / d")):
        for index, start in enumerate(("semantic", "positional")):
            mean, lengths = bars(largest[start][what])
            style = {"color": f"C{index}", "fmt": "os"[index], "markersize": 4}
            ax.errorbar(alphas, mean, lengths, label=f"{start} start, d = {largest['model']['d']}", **style)
            ax.plot(alphas, law_found[start][what], color=f"C{index}", linestyle="--", linewidth=1)
        ax.plot([], [], color="black", linestyle="--", linewidth=1, label="d → ∞")
        ax.set(ylabel=name, title="overlap with the target" if what == "theta" else "positional direction")
        ax.legend(frameon=False, fontsize=7, loc="center right")
    for ax in (loss, theta, m):
        ax.axvline(law_found["crossing"][0], color="0.5", linestyle=":", linewidth=1)
        ax.set_xlabel("α = samples / d")
    loss.legend(frameon=False, fontsize=7)
    for index, (with_positions, label) in enumerate(
        ((True, "values x + p (the model)"), (False, "values x"))
    ):
        chosen = [
            one
            for one in variants
            if one["model"]["values_with_positions"] == with_positions and one["crossing"] is not None
        ]
        if chosen:
            mean, lengths = bars([one["crossing"] for one in chosen])
            places = [1 / one["model"]["d"] for one in chosen]
            cross.errorbar(
                places, mean, lengths, color=f"C{index}", fmt="os"[index], markersize=4, label=label
            )
    cross.plot(
        0, law_found["crossing"][0], "*", color="black", markersize=8, label="d → ∞", clip_on=False, zorder=5
    )
    cross.axhline(law_found["crossing"][0], color="0.5", linestyle=":", linewidth=1)
    widths = sorted({one["model"]["d"] for one in variants})
    cross.set_xticks([0, *(1 / d for d in widths)], ["∞", *widths])
    cross.set(
        xlabel="d, on a scale of 1 / d",
        ylabel="α where the losses cross",
        title="crossing, mean over seeds",
        xlim=(0, None),
    )
    cross.legend(frameon=False, fontsize=7, loc="lower right")
    fig.suptitle(
        "Positional and semantic minima of tied low-rank attention\nmeans and 95 % intervals over seeds"
    )
    save(fig, "positional_transition", opts)


def draw_heads(results: dict[str, Any], opts: Options) -> None:
    """The share of every head of the encoder, trained, untrained and on shuffled text."""
    found = results["heads"]
    fig, axes = figure(1, 3, width=3.6, height=2.8)
    for ax, case, title in (
        (axes[0][0], "text", "trained"),
        (axes[0][1], "random", "at initialization"),
    ):
        image = ax.imshow(found["mean_by_head"][case], cmap="cividis", vmin=0, vmax=1, aspect="auto")
        ax.set(title=f"{title}: mean {found['mean'][case][0]:.2f}", xlabel="head", ylabel="layer")
    fig.colorbar(image, ax=list(axes[0][:2]), label="positional share")
    ax = axes[0][2]
    for layer, (x, y) in enumerate(
        zip(found["mean_by_head"]["text"], found["mean_by_head"]["shuffled"], strict=True)
    ):
        colour = ["C0", "C1", "C2", "C3", "C4", "C5"][layer % 6]
        ax.plot(x, y, "os^DvX"[layer % 6], color=colour, markersize=4, label=f"layer {layer}")
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    ax.set(xlabel="share on text", ylabel="share on shuffled tokens", title="trained, by head")
    ax.legend(frameon=False, fontsize=7)
    fig.suptitle(f"Share of logit variance that the offset i − j explains, {found['model']}")
    save(fig, "positional_heads", opts)


def main(argv: list[str] | None = None) -> None:
    """Run, write and draw."""
    opts = options(__doc__.splitlines()[0], argv)
    clock = Clock()
    torch.set_num_threads(1)
    write("positional", {"heads": real_heads(opts), "transition": transition(opts)}, opts, clock)
    results = read("positional", opts.out)  # figures show what the file holds
    draw_transition(results, opts)
    draw_heads(results, opts)
    for one in results["transition"]["variants"]:
        print(one["model"]["d"], one["model"]["values_with_positions"], one["seeds"], one["crossing"])
    print({case: value[0] for case, value in results["heads"]["mean"].items()})


if __name__ == "__main__":
    main()
