"""One self-contained HTML page about a run, from its record."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_qk._version import __version__
from lightning_qk.logging import figures
from lightning_qk.logging.health import VERDICTS, format_value, layer_health
from lightning_qk.logging.history import History, RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TONE = {
    "non-finite": "bad",
    "saturated": "bad",
    "uniform": "warn",
    "no data": "",
    "sink": "warn",
    "ok": "good",
}

_PAPERS = (
    "Bao, Hataya, Karakida: Self-attention Networks Localize When QK-eigenspectrum Concentrates. ICML 2024",
    "Dong, Cordonnier, Loukas: Attention is Not All You Need: Pure Attention Loses Rank Doubly Exponentially "
    "with Depth. ICML 2021",
    "Zhai et al.: Stabilizing Transformer Training by Preventing Attention Entropy Collapse. ICML 2023",
    "Wortsman et al.: Small-scale Proxies for Large-scale Transformer Training Instabilities. ICLR 2024",
    "Kimi Team: Kimi K2: Open Agentic Intelligence. 2025",
    "Gu et al.: When Attention Sink Emerges in Language Models: An Empirical View. ICLR 2025",
    "Sun et al.: Massive Activations in Large Language Models. 2024",
)

# Statistic → what it means, when to worry.
_MEANING = {
    "eig_mean": (
        "The mean eigenvalue of W_QK. Its sign says where attention goes in the model of Bao et al.: "
        "positive to late keys, near the query, and negative to early ones. At zero no side is preferred.",
        "it stays at zero in every layer while the variance shrinks: attention then heads for uniform.",
    ),
    "eig_var": (
        "How far the eigenvalues of W_QK spread. A small spread around a mean other than zero is what "
        "Bao et al. link to localized attention. It can be negative, since W_QK is not symmetric.",
        "it keeps growing long after the loss has settled.",
    ),
    "sym_var": (
        "How far the eigenvalues of the symmetric part of W_QK spread. It is never negative, and LocAteR "
        "makes it smaller. Bao et al. link a small spread around a mean other than zero to localized "
        "attention.",
        "it keeps growing long after the loss has settled, or one layer leaves the others far behind.",
    ),
    "asymmetry": (
        "0 where W_QK is symmetric (two tokens want each other alike), 1 where it is antisymmetric. "
        "A random head has 0.5.",
        "",
    ),
    "spectral_radius": (
        "The largest eigenvalue of W_QK in absolute value: how strongly its favourite direction is "
        "amplified.",
        "it jumps, or grows without end, with the largest logit following.",
    ),
    "singular_max": (
        "The largest singular value of W_QK: the bound on what a pair of tokens can add to a logit. For "
        "cross-attention it stands in for eigenvalues, which mean nothing there.",
        "it jumps, or grows without end, with the largest logit following.",
    ),
    "entropy_normalized": (
        "How evenly a query spreads its attention: 1 is uniform, 0 a single key.",
        "a whole layer falls towards 0 (entropy collapse, Zhai et al.) or stays at 1 after the warm-up, "
        "where every token receives the same mixture (rank collapse, Dong et al.).",
    ),
    "entropy": (
        "How widely a query spreads its attention, in nats: 0 is a single key, and the logarithm of the "
        "number of keys is uniform.",
        "a whole layer falls towards 0 (entropy collapse, Zhai et al.).",
    ),
    "max_abs_logit": (
        "The largest logit before the softmax, in absolute value.",
        "it passes 100, where Kimi K2 clips, or 10,000, above which every run of Wortsman et al. diverged.",
    ),
    "max_logit": (
        "The largest logit before the softmax.",
        "it passes 100, where Kimi K2 clips, or 10,000, above which every run of Wortsman et al. diverged.",
    ),
    "sink_first": (
        "The share of attention that goes to the first key. Language models tend to grow such a sink. "
        "Gu et al. count a key as one above 0.3.",
        "nearly all heads of a layer do so, and little attention is left for the content.",
    ),
    "linear_share": (
        "The share of query-key pairs in the range where the piecewise-linear softmax of Bao et al. is "
        "neither 0 nor 1, so that signal and gradient pass.",
        "it falls towards 0: attention saturates.",
    ),
    "localization": (
        "How much likelier late tokens pass signal through the piecewise-linear softmax of Bao et al. than "
        "early ones, predicted from the weights alone for tokens that are a Gaussian random walk: 1 is "
        "attention localized on late tokens, -1 on early ones.",
        "it stays at 0 in every layer: attention is uniform, or saturated where the largest logit is high.",
    ),
    "rank_residual_relative": (
        "How far the tokens of a sequence spread around their mean, against their size: 0 where all tokens are "
        "the same.",
        "it falls towards 0 in the later layers (rank collapse, Dong et al.).",
    ),
    "cosine_abs": (
        "How much two different tokens of a sequence point along one line: 1 where all do.",
        "it rises towards 1 layer by layer: tokens become alike.",
    ),
    "cosine": (
        "The mean cosine of two different tokens of a sequence: 1 where all point one way.",
        "it rises towards 1 layer by layer: tokens become alike.",
    ),
    "effective_rank": (
        "How many directions the sampled tokens of a sequence use, by the entropy of their singular values.",
        "it falls towards 1, or one layer has far less than its neighbours.",
    ),
    "activation_max": (
        "The largest activation. Trained models grow some that are thousands of times the median, which act as "
        "fixed biases (Sun et al.).",
        "it nears 65,504, where half precision ends, or keeps growing.",
    ),
}

_SPECTRUM_CURVES = (
    ("eig_mean",),
    ("sym_var", "eig_var"),
    ("spectral_radius", "singular_max"),
    ("localization",),
)
_ATTENTION_CURVES = (
    ("entropy_normalized", "entropy"),
    ("max_abs_logit", "max_logit"),
    ("sink_first",),
    ("linear_share",),
)
_HIDDEN_CURVES = (
    ("rank_residual_relative",),
    ("cosine_abs", "cosine"),
    ("effective_rank",),
    ("activation_max",),
)
_SPECTRUM_MAPS = (("sym_var", "eig_var", "singular_max"), ("asymmetry",))
_ATTENTION_MAPS = (
    ("entropy_normalized", "entropy"),
    ("max_abs_logit", "max_logit"),
    ("sink_first",),
    ("linear_share",),
)


@dataclass
class _Plot:
    svg: str
    alt: str
    meaning: str
    worry: str = ""
    wide: bool = False
    # Colours stand for values, on a scale that a dark page must not turn round.
    mapped: bool = False


@dataclass
class _Section:
    anchor: str
    title: str
    text: str
    plots: list[_Plot] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def write_report(record: RunRecord, path: str | Path) -> Path:
    """Write the report of a run: one HTML file that needs no network and no other file.

    The file appears whole or not at all. Parts that the record does not hold are named in a sentence.

    Args:
        record: the run.
        path: the file to write. Its folder is created.

    Returns:
        The path of the file.

    Raises:
        OSError: the file cannot be written there.
    """
    path = Path(path)
    page = _render(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _render(record: RunRecord) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = format_value
    source = files("lightning_qk.logging").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    health = layer_health(record)
    counts = Counter(row.verdict for row in health)
    model = next((value for name, value in record.info.items() if name.lower() == "model"), "")
    return environment.from_string(source).render(
        title=f"Attention report: {model}" if model else "Attention report",
        lead=_lead(record),
        info=record.info,
        notes=record.notes,
        health=health,
        reasons=sorted((row for row in health if row.reason), key=lambda row: VERDICTS.index(row.verdict)),
        verdicts=[(verdict, counts[verdict]) for verdict in VERDICTS if counts[verdict]],
        tone=_TONE,
        sections=_sections(record),
        papers=_PAPERS,
        version=__version__,
    )


def _lead(record: RunRecord) -> str:
    parts = []
    names = (
        ("weights", record.spectrum),
        ("attention", record.attention),
        ("hidden states", record.hidden),
    )
    for name, history in names:
        if history is not None and len(history):
            steps, heads = len(history), sum(history.heads)
            of_heads = "" if history is record.hidden else f"{heads} heads in "
            parts.append(
                f"{name} of {of_heads}{len(history.layers)} layers, {steps} kept "
                f"{'step' if steps == 1 else 'steps'} up to {history.steps[-1]}"
            )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else "Nothing was recorded in this run."


def _sections(record: RunRecord) -> list[_Section]:
    page = _Page(record)
    return [
        page.curves(
            "spectrum",
            "Query-key spectrum over time",
            "Each line is a layer. The numbers come from the weights alone.",
            record.spectrum,
            _SPECTRUM_CURVES,
        ),
        page.curves(
            "attention",
            "Attention over time",
            "Each line is a layer. The numbers are measured on the batches of the run.",
            record.attention,
            _ATTENTION_CURVES,
        ),
        *page.hidden(),
        page.maps(),
        page.relations(),
        page.eigenvalues(),
        *page.scalars(),
    ]


class _Page:
    """Makes sections, and gives every figure its own id prefix."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.count = 0

    def plot(self, figure: "Figure", alt: str, meaning: str, worry: str = "", **options: bool) -> _Plot:
        self.count += 1
        svg = figures.to_svg(figure, prefix=f"f{self.count}-", themed=True)
        return _Plot(svg, alt, meaning, worry, **options)

    def curves(
        self, anchor: str, title: str, text: str, history: History | None, wanted: Iterable[tuple[str, ...]]
    ) -> _Section:
        section = _Section(anchor, title, text)
        for name in _available(history, wanted):
            assert history is not None
            title = figures.describe(name).title
            newest = _range(figures.by_layer(history, name)[-1])
            alt = f"Line chart of {title} over steps, one line a layer. {newest}"
            section.plots.append(self.plot(figures.over_time(history, name), alt, *_MEANING[name]))
        if not section.plots:
            section.missing.append(f"No {anchor} statistics were recorded in this run.")
        return section

    def hidden(self) -> list[_Section]:
        """Curves of hidden states, when there are any: they are measured on request."""
        if self.record.hidden is None:
            return []
        text = (
            "Each line is a block's output, or what goes into the first block (embedding). The numbers are "
            "measured on the batches of the run."
        )
        return [self.curves("hidden", "Hidden states over time", text, self.record.hidden, _HIDDEN_CURVES)]

    def maps(self) -> _Section:
        section = _Section(
            "heads",
            "Every head at the newest step",
            "Layers from top to bottom, heads from left to right. Hatched cells have no value.",
        )
        for history, wanted in (
            (self.record.spectrum, _SPECTRUM_MAPS),
            (self.record.attention, _ATTENTION_MAPS),
        ):
            for name in _available(history, wanted):
                assert history is not None
                title, newest = figures.describe(name).title, _range(history.values[name][-1])
                alt = f"Heatmap of {title} by layer and head at step {history.steps[-1]}. {newest}"
                figure = figures.heatmap(history, name)
                section.plots.append(self.plot(figure, alt, *_MEANING[name], mapped=True))
        if not section.plots:
            section.missing.append("No per-head statistics were recorded in this run.")
        return section

    def relations(self) -> _Section:
        section = _Section(
            "theory",
            "Theory and measurement",
            "Each point is a head, coloured by its layer, at the newest steps.",
        )
        self._try(
            section,
            figures.entropy_against_variance,
            "Entropy against spectral variance needs both monitors on the same layers.",
            "Scatter plot of attention entropy against spectral variance, one point a head.",
            "Bao et al. find that attention localizes, without its entropy collapsing, where the eigenvalues "
            "concentrate: small variance around a mean other than zero.",
            "a cloud moves down and to the right (entropy collapse), or gathers at the top with a mean of "
            "zero (uniform attention).",
        )
        self._try(
            section,
            figures.propagation_predicted_measured,
            "Predicted and measured propagation need both monitors on the same layers.",
            "Scatter plot of predicted against measured signal propagation, one point a head, with a "
            "diagonal.",
            "On the dashed diagonal the prediction from the weights, for tokens that are a Gaussian random "
            "walk, agrees with the real logits. Heads off it see tokens that the model does not describe. "
            "Where logits are tiny, as in a fresh model, prediction tends to 0.5 and measurement to 1.",
            "points gather near zero on both axes: these heads pass no signal.",
        )
        return section

    def eigenvalues(self) -> _Section:
        section = _Section(
            "eigenvalues",
            "Eigenvalues in the complex plane",
            "The non-zero eigenvalues of W_QK, all heads of a layer together.",
        )
        self._try(
            section,
            figures.eigenvalue_plane,
            "No eigenvalues were recorded in this run.",
            "Scatter plots of eigenvalues in the complex plane, one panel a layer.",
            "The dashed circle, where there is one, holds nearly all eigenvalues of a random head of the "
            "same shape and Frobenius norm: what lies well outside was learnt. A cloud moved to the right "
            "is a positive mean, one on the real axis a symmetric W_QK.",
            "a few eigenvalues run far ahead of the cloud while the others shrink.",
            wide=True,
        )
        return section

    def scalars(self) -> list[_Section]:
        """Curves of the run, when there are any: most runs have no penalty, which is nothing to report."""
        if not any(steps for steps, _ in self.record.scalars.values()):
            return []
        section = _Section("penalty", "Curves of the run", "What was logged for the model as a whole.")
        self._try(
            section,
            figures.scalars_over_time,
            "",
            f"Line charts of {', '.join(self.record.scalars)} over steps.",
            "LocAteR's penalty is the spectral variance of all its heads, and no part of the logged loss.",
            "the penalty falls while the loss rises: the weight is too high.",
        )
        return [section]

    def _try(
        self,
        section: _Section,
        draw: Callable[[RunRecord], "Figure"],
        missing: str,
        alt: str,
        meaning: str,
        worry: str,
        wide: bool = False,
    ) -> None:
        try:
            figure = draw(self.record)
        except ValueError:
            section.missing.append(missing)
        else:
            section.plots.append(self.plot(figure, alt, meaning, worry, wide=wide))


def _available(history: History | None, wanted: Iterable[tuple[str, ...]]) -> Iterable[str]:
    """The first of each group that has a finite value at the newest step."""
    if history is None or not history.steps:
        return
    for group in wanted:
        for name in group:
            if name in history.values and bool(history.values[name][-1].isfinite().any()):
                yield name
                break


def _range(values: Tensor) -> str:
    finite = values[values.isfinite()]
    if not finite.numel():
        return "No finite values at the newest step."
    return f"Newest values from {format_value(float(finite.min()))} to {format_value(float(finite.max()))}."
