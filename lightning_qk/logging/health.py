"""A verdict on every attention layer at the end of a run."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_qk._printable import printable
from lightning_qk.logging.history import History, RunRecord

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

    Columns that matter less are left out where the console is narrow.

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
    columns = [
        ("layer", "label", False),
        ("eig mean", "eig_mean", True),
        ("eig var", "eig_var", False),
        ("asym", "asymmetry", True),
        ("entropy", "entropy_normalized", False),
        ("sink", "sink_first", False),
        ("max|logit|", "max_abs_logit", False),
        ("localization", "localization", True),
        ("linear share", "linear_share", False),
        ("verdict", "verdict", False),
    ]
    wide = console.width >= 112
    shown = [(title, name) for title, name, only_wide in columns if wide or not only_wide]
    table = Table(title=f"Attention health{_at_steps(record)}", title_justify="left", pad_edge=False)
    for title, name in shown:
        left = name in ("label", "verdict")
        table.add_column(title, justify="left" if left else "right", no_wrap=True, overflow="ellipsis")
    for row in rows:
        style = {"ok": "green", "sink": "yellow", "no data": "dim"}.get(row.verdict, "red")
        cells = []
        for _, name in shown:
            value = getattr(row, name)
            if name == "verdict":
                cells.append(f"[{style}]{value}[/{style}]")
            else:
                cells.append(escape(printable(value)) if isinstance(value, str) else format_value(value))
        table.add_row(*cells)
    console.print(table)
    reasons = sorted((row for row in rows if row.reason), key=lambda row: VERDICTS.index(row.verdict))
    for row in reasons[:_MAX_REASONS]:
        console.print(printable(f"{row.label}: {row.verdict}, {row.reason}"), markup=False, highlight=False)
    if len(reasons) > _MAX_REASONS:
        console.print(f"and {len(reasons) - _MAX_REASONS} layers more", markup=False, highlight=False)


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


def _newest(history: History | None, label: str) -> dict[str, Tensor]:
    """Statistic → newest values of a layer's heads."""
    if history is None or not history.steps or label not in history.layers:
        return {}
    layer = history.layers.index(label)
    return {name: history.split(column[-1])[layer].double() for name, column in history.values.items()}


def _judge(label: str, record: RunRecord) -> LayerHealth:
    spectrum, attention = _newest(record.spectrum, label), _newest(record.attention, label)
    verdict, reason = _verdict(spectrum, attention)
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


def _verdict(spectrum: dict[str, Tensor], attention: dict[str, Tensor]) -> tuple[str, str]:
    bad = _non_finite(spectrum, attention)
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
    if not attention and not any(value.isfinite().any() for value in spectrum.values()):
        return "no data", "nothing was recorded"
    if attention and all(value.isnan().all() for value in attention.values()):
        return "no data", "every attention statistic is NaN: NaN logits, or the layer did not run"
    sink = attention.get("sink_first")
    if sink is not None and (sink > SINK_ATTENTION).sum() >= SINK_HEADS * max(int((~sink.isnan()).sum()), 1):
        head, value = _worst(sink)
        return "sink", (
            f"{int((sink > SINK_ATTENTION).sum())} of {sink.numel()} heads give the first key over 0.3, "
            f"most head {head} ({value:.2f})"
        )
    return "ok", ""


def _non_finite(spectrum: dict[str, Tensor], attention: dict[str, Tensor]) -> str:
    """Which head has a non-finite weight or logit, or an empty string.

    NaN alone means that a head has no value, as the eigenvalues of cross-attention. It is a fault where every
    layer has a value (the Frobenius norm), and where other statistics of the same head are known.
    """
    for values in (spectrum, attention):
        for name, value in values.items():
            if value.isinf().any():
                return f"{name} of head {int(value.isinf().nonzero()[0])} is infinite"
    norm = spectrum.get("frobenius_sq")
    if norm is not None and norm.isnan().any():
        return f"the weights of head {int(norm.isnan().nonzero()[0])} hold NaN"
    logits = attention.get("max_abs_logit")
    if logits is not None:
        known = torch.stack([~value.isnan() for value in attention.values()]).any(dim=0)
        broken = logits.isnan() & (known | (~logits.isnan()).any())
        if broken.any():
            return f"the logits of head {int(broken.nonzero()[0])} hold NaN"
    return ""


def _worst(values: Tensor) -> tuple[int, float]:
    """Index and value of the largest, NaN left out."""
    head = int(values.nan_to_num(nan=-math.inf).argmax())
    return head, float(values[head])
