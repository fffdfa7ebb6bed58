"""A verdict on every attention layer at the end of a run."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_qk._printable import printable
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.states import DID_NOT_RUN, EMPTY, LEFT_OUT, NO_DATA, NO_VALUE, NOT_FINITE

if TYPE_CHECKING:
    from rich.console import Console

# Every run of Wortsman et al. 2023 (arXiv 2309.14322) whose attention logits passed this diverged.
DIVERGED_LOGIT = 1e4
# The threshold above which Kimi K2 (arXiv 2507.20534) scales query and key weights down: QK-clip.
QK_CLIP_LOGIT = 100.0
# Zhai et al. 2023 (arXiv 2303.06296) call pathologically low entropy entropy collapse and give no number.
# This one is ours, on the mean of a layer's heads, since a single sharp head is common in healthy models.
COLLAPSED_ENTROPY = 0.05
# Ours. Attention spread evenly over a share a of n keys has normalized entropy 1 + ln a / ln n: above 0.98, a
# is over 87 % at n = 1024, so there is no localization. Noci et al. 2022 (arXiv 2206.03126) tie uniform
# attention to rank collapse. A freshly initialized model is here too.
UNIFORM_ENTROPY = 0.98
# Gu et al. 2025 (arXiv 2410.10781) count a key as a sink above this attention.
SINK_ATTENTION = 0.3
# Ours: from this share of its heads on, the layer is named for its sink.
SINK_HEADS = 0.5

# Worst first.
VERDICTS = ("non-finite", "saturated", "uniform", "no data", "sink", "ok")
_MAX_REASONS = 12


@dataclass(frozen=True)
class LayerHealth:
    """The newest state of one layer. Numbers are means over its heads unless said otherwise; NaN is unknown.

    Attributes:
        label: the layer.
        eig_mean: eigenvalue mean of W_QK.
        eig_var: eigenvalue variance of W_QK.
        asymmetry: 0 for a symmetric W_QK, 1 for an antisymmetric one.
        entropy_normalized: attention entropy over the log of the number of keys.
        sink_first: attention to the first key.
        max_abs_logit: largest absolute logit of any head.
        localization: predicted localization, late minus early positions.
        linear_share: its measured counterpart.
        verdict: one of :data:`VERDICTS`, the worst that holds.
        reason: why, with the worst head; empty for ``"ok"``.
    """

    label: str
    eig_mean: float
    eig_var: float
    asymmetry: float
    entropy_normalized: float
    sink_first: float
    max_abs_logit: float
    localization: float
    linear_share: float
    verdict: str
    reason: str


def layer_health(record: RunRecord) -> list[LayerHealth]:
    """Judge every layer by its newest statistics.

    Verdicts describe, they do not prove: thresholds and their sources stand at the top of this module.

    Returns:
        One row a layer, in the order of the spectrum's history, then layers that only attention knows.
    """
    labels = [label for history in (record.spectrum, record.attention) if history for label in history.layers]
    return [_judge(label, record) for label in dict.fromkeys(labels)]


def print_health(record: RunRecord, console: "Console | None" = None) -> None:
    """Print the layers' health as a table, and below it the reasons, the worst layers first.

    Where the console is narrow, columns that matter less are left out, and titles take two lines; numbers and
    verdicts are never cut, and a name that is longer than what is left goes on in the next line.

    Args:
        record: the run.
        console: where to print. Default: standard output.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows = layer_health(record)
    if not rows:
        return
    console = console or Console()
    texts = {
        title: [
            printable(value) if isinstance(value := getattr(row, name), str) else format_value(value)
            for row in rows
        ]
        for title, name in _COLUMNS.items()
    }
    table = Table(title=f"Attention health{_at_steps(record)}", title_justify="left", pad_edge=False)
    shown = _columns_that_fit(texts, console.width)
    for title, header in shown.items():
        left = title in ("layer", "verdict")
        table.add_column(
            header, justify="left" if left else "right", no_wrap=title != "layer", overflow="fold"
        )
    for index, row in enumerate(rows):
        style = {"ok": "green", "sink": "yellow", "no data": "dim"}.get(row.verdict, "red")
        cells = [escape(texts[title][index]) for title in shown]
        table.add_row(*cells[:-1], f"[{style}]{cells[-1]}[/{style}]")
    console.print(table)
    reasons = sorted((row for row in rows if row.reason), key=lambda row: VERDICTS.index(row.verdict))
    for row in reasons[:_MAX_REASONS]:
        console.print(printable(f"{row.label}: {row.verdict}, {row.reason}"), markup=False, highlight=False)
    if len(reasons) > _MAX_REASONS:
        console.print(f"and {len(reasons) - _MAX_REASONS} layers more", markup=False, highlight=False)


# Title → what it shows; the layer is first and the verdict last.
_COLUMNS = {
    "layer": "label",
    "eig mean": "eig_mean",
    "eig var": "eig_var",
    "asym": "asymmetry",
    "entropy": "entropy_normalized",
    "sink": "sink_first",
    "max|logit|": "max_abs_logit",
    "localization": "localization",
    "linear share": "linear_share",
    "verdict": "verdict",
}
# What is left out where a console is narrow: first all of these, then one after the other of those.
_ONLY_WIDE = ("eig mean", "asym", "localization")
_NEXT_OUT = ("linear share", "sink", "eig var")


def _columns_that_fit(texts: dict[str, list[str]], width: int) -> dict[str, str]:
    """Columns that fit into a width, each with its title, which may have two lines.

    Args:
        texts: title → what stands in the column.
        width: of the console, in cells.
    """
    from rich.cells import cell_len

    narrow = [title for title in texts if title not in _ONLY_WIDE]
    fewer = [[title for title in narrow if title not in _NEXT_OUT[:out]] for out in range(len(_NEXT_OUT) + 1)]
    one_line = [{title: title for title in titles} for titles in (list(texts), narrow)]
    two_lines = [
        {title: title.replace(" ", "\n").replace("max|", "max\n|") for title in titles} for titles in fewer
    ]
    for shown in (*one_line, *two_lines):
        cells = [(*header.split("\n"), *texts[title]) for title, header in shown.items()]
        # A column has a border and a space on both sides, but for the edges of the table.
        if sum(max(map(cell_len, column)) + 3 for column in cells) - 1 <= width:
            return shown
    return two_lines[-1]


def format_value(value: float) -> str:
    """A number in at most eight characters, and a dash for an unknown one."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:#.3g}" if abs(value) < 99.95 else f"{value:.0f}"


def _at_steps(record: RunRecord) -> str:
    steps = [
        history.steps[-1] for history in (record.spectrum, record.attention) if history and history.steps
    ]
    if not steps:
        return ""
    if len(set(steps)) == 1:
        # A run that ended before its first measurement has that of the weights it began with.
        return f" at step {steps[0]}" if steps[0] >= 0 else " before training"
    return f" at step {steps[0]} (attention: {steps[1]})"


@dataclass(frozen=True)
class Newest:
    """What is known of a layer, or of one head, at the newest step that it has numbers of.

    Attributes:
        values: statistic → values of the heads; empty where nothing is known.
        states: one a head, see :mod:`lightning_qk.record.states`; None where a record does not tell.
        missing: why it has no numbers, or why they are not of the newest step; empty where neither holds.
        is_cross: it has singular values, and at no step a norm: cross-attention, in a record without states.
    """

    values: dict[str, Tensor]
    states: Tensor | None = None
    missing: str = ""
    is_cross: bool = False


def newest_of(history: History | None, label: str) -> Newest:
    """The newest numbers of a layer: a step at which it was not run says nothing of them."""
    if history is None or label not in history.layers:
        return Newest({})
    layer = history.layers.index(label)
    reason = history.reasons.get(label, "")
    if not history.steps:
        return Newest({}, missing=reason)
    last = len(history.steps) - 1
    index = next((i for i in range(last, -1, -1) if not _is_empty(history.state(label, i))), last)
    states = history.state(label, index)
    values = {name: history.split(column[index])[layer].double() for name, column in history.values.items()}
    if index != last:
        newest = history.state(label, last)
        assert newest is not None  # it is empty
        when = f"measured at step {history.steps[index]}: at step {history.steps[last]}"
        return Newest(values, states, f"{when} {_EMPTY_WORDS[int(newest[0])]}")
    if states is not None and bool((states == LEFT_OUT).all()):
        return Newest(values, states, f"it is left out: {reason}" if reason else "it is left out")
    if _is_empty(states):
        assert states is not None
        steps = "the measured step" if last == 0 else f"the {last + 1} measured steps that are kept"
        return Newest(values, states, f"at {steps} {_EMPTY_WORDS[int(states[0])]}")
    return Newest(values, states, is_cross=states is None and _is_cross(history, layer))


_EMPTY_WORDS = {
    DID_NOT_RUN: "it did not run, or its attention could not be seen",
    NO_DATA: "it had nothing to measure: padding or generation alone, or too few tokens",
}


def _is_empty(states: Tensor | None) -> bool:
    return states is not None and all(int(state) in EMPTY for state in states)


def _judge(label: str, record: RunRecord) -> LayerHealth:
    newest_spectrum, newest_attention = newest_of(record.spectrum, label), newest_of(record.attention, label)
    spectrum, attention = newest_spectrum.values, newest_attention.values
    verdict, reason = _verdict(newest_spectrum, newest_attention)
    missing = torch.full((1,), math.nan, dtype=torch.float64)

    def mean(values: dict[str, Tensor], name: str) -> float:
        return float(values.get(name, missing).nanmean())

    logits = attention.get("max_abs_logit", missing)
    known = logits[~logits.isnan()]
    return LayerHealth(
        label=label,
        eig_mean=mean(spectrum, "eig_mean"),
        eig_var=mean(spectrum, "eig_var"),
        asymmetry=mean(spectrum, "asymmetry"),
        entropy_normalized=mean(attention, "entropy_normalized"),
        sink_first=mean(attention, "sink_first"),
        max_abs_logit=float(known.max()) if known.numel() else math.nan,
        localization=mean(spectrum, "localization"),
        linear_share=mean(attention, "linear_share"),
        verdict=verdict,
        reason=reason,
    )


def _verdict(newest_spectrum: Newest, newest_attention: Newest) -> tuple[str, str]:
    spectrum, attention = newest_spectrum.values, newest_attention.values
    bad = _non_finite(newest_spectrum, newest_attention)
    if bad:
        return "non-finite", bad
    logits = attention.get("max_abs_logit")
    if logits is not None and (logits > QK_CLIP_LOGIT).any():
        head, value = _worst(logits)
        size = f"an absolute logit of {format_value(value)}"
        if value > DIVERGED_LOGIT:
            return "saturated", f"head {head} has {size}: above 1e4 every run of Wortsman et al. diverged"
        return "saturated", f"head {head} has {size}, above the 100 where Kimi K2 clips"
    entropy = attention.get("entropy_normalized")
    if entropy is not None and entropy.nanmean() < COLLAPSED_ENTROPY:
        head, value = _worst(-entropy)
        return "saturated", (
            f"mean normalized entropy {float(entropy.nanmean()):.3f}, least in head {head} ({-value:.3f}): "
            "the side of entropy collapse"
        )
    if entropy is not None and entropy.nanmean() > UNIFORM_ENTROPY:
        head, value = _worst(entropy)
        return "uniform", (
            f"mean normalized entropy {float(entropy.nanmean()):.3f}, most in head {head} ({value:.3f}): "
            "no localization, as in a fresh model or towards rank collapse"
        )
    measured = any(value.isfinite().any() for value in attention.values())
    if newest_attention.missing and not measured:
        return "no data", newest_attention.missing
    if attention and not measured:
        untold = "every attention statistic is NaN: NaN logits, or the layer did not run"
        known = "at no row of it attention has a value"
        return "no data", untold if newest_attention.states is None else known
    if not attention and not any(value.isfinite().any() for value in spectrum.values()):
        is_healthy = newest_spectrum.states is not None and bool((newest_spectrum.states == NO_VALUE).all())
        if not is_healthy:
            return "no data", newest_spectrum.missing or "nothing was recorded"
    sink = attention.get("sink_first")
    if sink is not None and (sink > SINK_ATTENTION).sum() >= SINK_HEADS * max(int((~sink.isnan()).sum()), 1):
        head, value = _worst(sink)
        return "sink", (
            f"{int((sink > SINK_ATTENTION).sum())} of {sink.numel()} heads give the first key over 0.3, "
            f"most head {head} ({value:.2f})"
        )
    return "ok", newest_attention.missing


def _non_finite(spectrum: Newest, attention: Newest) -> str:
    """Which head has a non-finite weight or logit, or an empty string.

    NaN alone means that a head has no value. States tell; where a record of an earlier version has none, it is a
    fault where a statistic is unknown of some heads of a layer, or beside others that are known.
    """
    for newest in (spectrum, attention):
        for name, value in newest.values.items():
            if value.isinf().any():
                return f"{name} of head {int(value.isinf().nonzero()[0])} is infinite"
    for newest, subject in ((spectrum, "weights"), (attention, "logits")):
        if newest.states is not None and (newest.states == NOT_FINITE).any():
            return f"the {subject} of head {int((newest.states == NOT_FINITE).nonzero()[0])} hold NaN"
    norm = spectrum.values.get("frobenius_sq")
    if spectrum.states is None and norm is not None and norm.isnan().any() and not spectrum.is_cross:
        return f"the weights of head {int(norm.isnan().nonzero()[0])} hold NaN"
    logits = attention.values.get("max_abs_logit")
    if attention.states is None and logits is not None:
        known = torch.stack([~value.isnan() for value in attention.values.values()]).any(dim=0)
        broken = logits.isnan() & (known | (~logits.isnan()).any())
        if broken.any():
            return f"the logits of head {int(broken.nonzero()[0])} hold NaN"
    return ""


def _is_cross(history: History, layer: int) -> bool:
    def of(name: str) -> list[Tensor]:
        return [history.split(column)[layer] for column in history.values.get(name, ())]

    largest = of("singular_max")
    return bool(largest and largest[-1].isfinite().any()) and not any(
        norm.isfinite().any() for norm in of("frobenius_sq")
    )


def _worst(values: Tensor) -> tuple[int, float]:
    """Index and value of the largest, NaN left out."""
    head = int(values.nan_to_num(nan=-math.inf).argmax())
    return head, float(values[head])
