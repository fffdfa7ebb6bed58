"""The one judge of layers and heads: every threshold with its source, and what is said of a record.

The table, the report, HeadReport, ``inspect`` and the guard share these numbers. A verdict says where to look and
proves nothing: one saturated head, or some sinks, are common in healthy models.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qk.functional.attention import SINK_ATTENTION
from lightning_qk.guard.detectors import Sensitivity
from lightning_qk.record.history import RunRecord
from lightning_qk.record.newest import Newest
from lightning_qk.record.states import NOT_FINITE

QK_CLIP_LOGIT = 100.0
"""Saturated above it: where Kimi K2 (arXiv 2507.20534) scales query and key weights down."""
DIVERGED_LOGIT = 1e4
"""Every run of Wortsman et al. 2023 (arXiv 2309.14322) with larger attention logits diverged."""
COLLAPSED_ENTROPY = Sensitivity.entropy
"""Saturated below it, in normalized entropy: 0.05, ours. Zhai et al. 2023 (arXiv 2303.06296) give no number. A
layer is judged by the mean of its heads, since a single such head is common in healthy models."""
SATURATED_PROBABILITY = 0.95
"""Saturated from here on in the largest probability of a row, unless a sink or the position explains it. Ours."""
SATURATED_PROPAGATION = 0.1
"""Saturated below it, where only the weights are known. Ours: averaged over positions, signal passes with
probability ½ where nothing saturates, be attention uniform or localized, and with less as the softmax does."""
GROWING_LOGIT, GROWN_BY, GROWN_POINTS = 10.0, 1.5, 6
"""Growing: a logit above a tenth of where Kimi K2 clips, half as large again as two thirds through at least six
kept steps. Ours."""
UNIFORM_ENTROPY = 0.98
"""Uniform above it, in normalized entropy. Ours: attention spread evenly over a share a of n keys has normalized
entropy 1 + ln a / ln n, so that a is over 87 % at n = 1024. Noci et al. 2022 (arXiv 2206.03126) tie uniform
attention to rank collapse; a freshly initialized model is here too."""
LOCALIZED_FROM = 0.5
"""Predicted as localized from here on, in (late − early) / (late + early), and as uniform below: one half of the
positions passes at least three times as much signal as the other. Ours."""
SINK_BEYOND_UNIFORM = 0.25
"""A sink takes at least this share of what uniform attention would leave to the other keys: where Gu et al.'s 0.3
(arXiv 2410.10781, ``SINK_ATTENTION``) lies for the 64 tokens that they measured. Over up to 9 tokens even uniform
causal attention gives the first key more than 0.3."""
SINK_HEADS = 0.5
"""A layer is a sink from this share of its heads on. Ours."""
POSITIONAL_SHARE = 0.5
"""Positional from here on: the offset explains more of the logits than content does. Ours, after the distinction
of Cui et al. 2024 (arXiv 2402.03902)."""
DEAD_OUTPUT = 1e-3
"""Dead up to it, in output relative to the layer's largest head. Ours."""

VERDICTS = {
    "non-finite": "weights, logits or statistics are NaN or infinite",
    "saturated": "logits above 100, nearly one key a query, or weights that let next to no signal pass",
    "growing": "logits grew by half or more over the last third of the run",
    "uniform": "looks everywhere alike, as in a fresh model",
    "sink": "much attention goes to the first key; common in language models",
    "no data": "nothing was measured",
    "ok": "nothing stands out",
}
"""Verdict → what it says, the worst first."""

SATURATED, UNIFORM, LATE, EARLY, UNKNOWN = "saturated", "uniform", "localized", "localized (early)", "-"


def is_saturated(
    entropy: float,
    max_prob: float,
    logit: float = math.nan,
    *,
    explained: bool = False,
    collapsed: float = COLLAPSED_ENTROPY,
    one_key: float = SATURATED_PROBABILITY,
) -> bool:
    """Whether measured attention lets next to no signal pass: nearly one key a query, or logits beyond clipping.

    Args:
        entropy: normalized entropy. NaN is unknown, here and below.
        max_prob: largest probability of a row.
        logit: largest absolute logit.
        explained: whether a sink or the position explains a large probability.
        collapsed: threshold of the entropy.
        one_key: threshold of the probability.
    """
    is_one_key = max_prob >= one_key and not math.isnan(entropy) and not explained
    return logit > QK_CLIP_LOGIT or entropy < collapsed or is_one_key


def is_sink(
    share: float,
    entropy: float = math.nan,
    normalized: float = math.nan,
    *,
    threshold: float = SINK_ATTENTION,
) -> bool:
    """Whether a key takes much attention, and more than uniform causal attention would give the first one.

    Uniform causal attention over n tokens gives the first key H_n / n, where log(n!) / n is the mean logarithm of
    the number of visible keys, which is about entropy over normalized entropy. Derived.

    Args:
        share: attention to the key.
        entropy: of the head, in nats; where it is unknown the threshold alone decides.
        normalized: its normalized entropy.
        threshold: for long sequences.
    """
    if not (entropy > 0 and normalized > 0):
        return share > threshold
    logarithm = entropy / normalized
    tokens = math.e * math.exp(min(logarithm, 100.0))
    for _ in range(8):  # Stirling's formula for log(n!) / n, solved for n
        tokens = math.exp(min(logarithm, 100.0) + 1 - math.log(2 * math.pi * tokens) / (2 * tokens))
    uniform = min((math.log(tokens) + 0.5772 + 0.5 / tokens) / tokens, 1.0)
    return share > max(threshold, uniform + SINK_BEYOND_UNIFORM * (1 - uniform))


def head_regimes(propagation: Tensor, localization: Tensor) -> list[str]:
    """The regime of each head in the model of Bao et al., ICML 2024 (arXiv 2402.02098), by the softmax scale.

    For tokens that are a Gaussian random walk of identity covariance: ``"saturated"`` where next to no signal
    passes the piecewise linear softmax, the side of entropy collapse; ``"localized"`` where that of late tokens
    passes and that of early ones does not, ``"localized (early)"`` the other way round; ``"uniform"`` where all
    pass alike, the side of rank collapse. It describes the weights under a model of the tokens and measures
    nothing. Derived.

    Args:
        propagation: predicted propagation, averaged over positions, shape ``(heads,)``.
        localization: that of the later half of the positions minus that of the earlier half.

    Returns:
        One regime a head; a dash for a head without values.
    """
    return [_regime(*pair) for pair in zip(propagation.tolist(), localization.tolist(), strict=True)]


def _regime(propagation: float, localization: float) -> str:
    if math.isnan(propagation) or math.isnan(localization):
        return UNKNOWN
    if propagation < SATURATED_PROPAGATION:
        return SATURATED
    contrast = localization / (2 * propagation)  # (late − early) / (late + early)
    if abs(contrast) < LOCALIZED_FROM:
        return UNIFORM
    return LATE if contrast > 0 else EARLY


def layer_regime(regimes: Iterable[str]) -> str:
    """The regimes of a layer's heads in a few words: the commonest first, with counts where there are several."""
    counts = Counter(regimes).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{count} {name}" for name, count in counts)


@dataclass(frozen=True)
class HeadHealth:
    """The newest state of one head.

    Attributes:
        label: its layer.
        head: its index in the layer.
        verdict: one of :data:`VERDICTS`, the worst that holds.
        reason: why; empty for ``"ok"``.
        badness: how far beyond the verdict's threshold, to sort by; larger is worse.
    """

    label: str
    head: int
    verdict: str
    reason: str
    badness: float


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

    Returns:
        One row a layer, in the order of the spectrum's history, then layers that only attention knows.
    """
    histories = (record.spectrum, record.attention)
    labels = dict.fromkeys(label for history in histories if history is not None for label in history.layers)
    return [_judge_layer(_Layer(label, record)) for label in labels]


def head_health(record: RunRecord) -> list[HeadHealth]:
    """Judge every head by its newest statistics, the worst first.

    Measured attention decides where there is any, and else what the weights predict.

    Returns:
        One entry a head of every layer that was recorded.
    """
    histories = [h for h in (record.spectrum, record.attention) if h is not None and h.steps]
    found = []
    for label in dict.fromkeys(label for history in histories for label in history.layers):
        layer = _Layer(label, record)
        found += [_judge_head(layer, head) for head in range(layer.heads)]
    order = list(VERDICTS)
    return sorted(found, key=lambda row: (order.index(row.verdict), -row.badness))


_EXTREMES = (
    ("attention", "max_abs_logit", False, "the largest |logit| of all heads, {}"),
    ("attention", "entropy_normalized", True, "the sharpest of all heads: normalized entropy {}"),
    ("attention", "sink_first", False, "gives most to the first key of all heads, {}"),
    ("spectrum", "spectral_radius", False, "the largest |eigenvalue| of all heads, {}"),
    ("spectrum", "sym_var", False, "the largest spectral variance of all heads, {}"),
)
"""What to look at where nothing is wrong: history, statistic, whether the smallest counts, and the words."""


def extreme_heads(record: RunRecord) -> list[HeadHealth]:
    """Heads that are first in something, which is no fault: a place to start where no verdict stands out.

    Returns:
        One entry a head, with verdict ``"ok"`` and what it is first in.
    """
    found: dict[tuple[str, int], list[str]] = {}
    for name, statistic, smallest, words in _EXTREMES:
        history = record.histories.get(name)
        if history is None or not history.steps or statistic not in history.values or sum(history.heads) < 2:
            continue
        values = history.values[statistic][-1].tolist()
        known = [place for place, value in enumerate(values) if math.isfinite(value)]
        if known:
            first = (min if smallest else max)(known, key=values.__getitem__)
            places = [
                (label, head)
                for label, n in zip(history.layers, history.heads, strict=True)
                for head in range(n)
            ]
            found.setdefault(places[first], []).append(words.format(format_value(values[first])))
    return [HeadHealth(label, head, "ok", "; ".join(words), 0.0) for (label, head), words in found.items()]


def format_value(value: float) -> str:
    """A number in at most eight characters, and a dash for an unknown one."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:#.3g}" if abs(value) < 99.95 else f"{value:.0f}"


class _Layer:
    """What is known of a layer, read once for itself and all of its heads."""

    def __init__(self, label: str, record: RunRecord) -> None:
        self.label = label
        self.spectrum, self.attention = Newest(record.spectrum, label), Newest(record.attention, label)
        self.heads = self.attention.heads or self.spectrum.heads
        values = {**Newest(record.position, label).values, **self.spectrum.values, **self.attention.values}
        self._values = {name: value.tolist() for name, value in values.items()}
        self.broken = self._broken()

    def of(self, statistic: str, head: int) -> float:
        """Newest value of a head; NaN where unknown."""
        values = self._values.get(statistic, ())
        return values[head] if head < len(values) else math.nan

    def all(self, statistic: str) -> list[float]:
        """Known values of all heads."""
        return [value for value in self._values.get(statistic, ()) if not math.isnan(value)]

    def mean(self, statistic: str) -> float:
        """Mean over the heads."""
        known = self.all(statistic)
        return sum(known) / len(known) if known else math.nan

    def worst(self, statistic: str, *, least: bool = False) -> tuple[int, float]:
        """Index and value of the largest, or the least."""
        values = self._values[statistic]
        known = [head for head, value in enumerate(values) if not math.isnan(value)]
        head = (min if least else max)(known, key=values.__getitem__)
        return head, values[head]

    def is_sink(self, head: int) -> bool:
        """Whether the first key is a sink of a head."""
        return is_sink(*(self.of(name, head) for name in ("sink_first", "entropy", "entropy_normalized")))

    def grew_from(self, head: int) -> float:
        """Largest logit of a head two thirds through the kept steps, where it has grown since then; else NaN."""
        series, now = self.attention.logits, self.of("max_abs_logit", head)
        if series is None or len(series) < GROWN_POINTS or not now > GROWING_LOGIT:
            return math.nan
        before = float(series[2 * len(series) // 3 - 1, head])
        return before if now >= GROWN_BY * before else math.nan

    def _broken(self) -> dict[int, tuple[str, str]]:
        """Head → what of it is not finite, and how.

        NaN alone means that a head has no value. States say which; where an older record has none, it is a
        fault where a statistic is unknown of some heads of a layer, or beside others that are known.
        """
        found: dict[int, tuple[str, str]] = {}

        def note(mask: Tensor, subject: str, how: str) -> None:
            for head in mask.nonzero().flatten().tolist():
                found.setdefault(head, (subject, how))

        both = ((self.spectrum, "weights"), (self.attention, "logits"))
        for newest, _ in both:
            for name, value in newest.values.items():
                note(value.isinf(), name, "is infinite")
        for newest, subject in both:
            if newest.states is not None:
                note(newest.states == NOT_FINITE, subject, "hold NaN")
        norm, logits = self.spectrum.values.get("frobenius_sq"), self.attention.values.get("max_abs_logit")
        if norm is not None and not self.spectrum.explains_nan:
            note(norm.isnan(), "weights", "hold NaN")
        if logits is not None and not self.attention.explains_nan:
            known = torch.stack([~value.isnan() for value in self.attention.values.values()]).any(dim=0)
            note(logits.isnan() & (known | (~logits.isnan()).any()), "logits", "hold NaN")
        return found


_MEANS = tuple(
    name
    for name in LayerHealth.__annotations__
    if name not in ("label", "max_abs_logit", "verdict", "reason")
)


def _judge_layer(layer: _Layer) -> LayerHealth:
    verdict, reason = _layer_verdict(layer)
    return LayerHealth(
        label=layer.label,
        max_abs_logit=max(layer.all("max_abs_logit"), default=math.nan),
        **{name: layer.mean(name) for name in _MEANS},
        verdict=verdict,
        reason=reason,
    )


def _layer_verdict(layer: _Layer) -> tuple[str, str]:
    spectrum, attention = layer.spectrum, layer.attention
    for head, (subject, how) in layer.broken.items():
        return "non-finite", f"{'' if how == 'is infinite' else 'the '}{subject} of head {head} {how}"
    if max(layer.all("max_abs_logit"), default=0.0) > QK_CLIP_LOGIT:
        head, value = layer.worst("max_abs_logit")
        size = f"an absolute logit of {format_value(value)}"
        if value > DIVERGED_LOGIT:
            return "saturated", f"head {head} has {size}: above 1e4 every run of Wortsman et al. diverged"
        return "saturated", f"head {head} has {size}, above the 100 where Kimi K2 clips"
    sinks = [head for head in range(layer.heads) if layer.is_sink(head)]
    known = len(layer.all("sink_first"))
    sinks_rule = bool(sinks) and len(sinks) >= SINK_HEADS * known
    entropy, top = layer.mean("entropy_normalized"), layer.mean("max_prob")
    explained = sinks_rule or layer.mean("positional_share") >= POSITIONAL_SHARE
    if is_saturated(entropy, top, explained=explained):
        if entropy < COLLAPSED_ENTROPY:
            head, value = layer.worst("entropy_normalized", least=True)
            number = f"normalized entropy {entropy:.3f}, least"
        else:
            head, value = layer.worst("max_prob")
            number = f"largest probability {top:.3f}, most"
        return "saturated", f"mean {number} in head {head} ({value:.3f}): the side of entropy collapse"
    for head in range(layer.heads):
        before = layer.grew_from(head)
        if not math.isnan(before):
            return "growing", _grew(
                f"the largest |logit| of head {head}", before, layer.of("max_abs_logit", head)
            )
    if entropy > UNIFORM_ENTROPY:
        head, value = layer.worst("entropy_normalized")
        return "uniform", (
            f"mean normalized entropy {entropy:.3f}, most in head {head} ({value:.3f}): "
            "no localization, as in a fresh model or towards rank collapse"
        )
    if attention.missing and not attention.is_measured:
        return "no data", attention.missing
    if attention.values and not attention.is_measured:
        unknown = "every attention statistic is NaN: NaN logits, or the layer did not run"
        return "no data", unknown if attention.states is None else "at no row of it attention has a value"
    if not attention.values and not spectrum.is_measured and not spectrum.has_no_value:
        return "no data", spectrum.missing or "nothing was recorded"
    if sinks_rule:
        head, value = layer.worst("sink_first")
        return (
            "sink",
            f"{len(sinks)} of {layer.heads} heads give the first key over 0.3, most head {head} ({value:.2f})",
        )
    return "ok", attention.missing


def _judge_head(layer: _Layer, head: int) -> HeadHealth:
    return HeadHealth(layer.label, head, *_head_verdict(layer, head))


def _head_verdict(layer: _Layer, head: int) -> tuple[str, str, float]:
    """Verdict, reason and badness."""
    spectrum, attention = layer.spectrum, layer.attention
    if head in layer.broken:
        return "non-finite", f"its {' '.join(layer.broken[head])}", 0.0
    own = {name: layer.of(name, head) for name in (*spectrum.values, *attention.values)}
    if all(math.isnan(value) for value in own.values()):
        if spectrum.has_no_value and not attention.missing:
            return "ok", "", 0.0
        return "no data", attention.missing or spectrum.missing or "nothing is known of it", 0.0
    logit, entropy = layer.of("max_abs_logit", head), layer.of("entropy_normalized", head)
    if logit > QK_CLIP_LOGIT:
        source = "100, where Kimi K2 clips"
        if logit > DIVERGED_LOGIT:
            source = "1e4, where every run of Wortsman et al. diverged"
        return "saturated", f"its largest |logit| is {format_value(logit)}, above {source}", logit
    sink, top = layer.is_sink(head), layer.of("max_prob", head)
    if is_saturated(entropy, top, explained=sink or layer.of("positional_share", head) >= POSITIONAL_SHARE):
        number = "" if entropy < COLLAPSED_ENTROPY else f", largest probability {top:.3f}"
        return "saturated", f"normalized entropy {entropy:.3f}{number}: nearly one key a query", 1 - entropy
    before = layer.grew_from(head)
    if not math.isnan(before):
        return "growing", _grew("its largest |logit|", before, logit), logit / before
    if entropy > UNIFORM_ENTROPY:
        return "uniform", f"normalized entropy {entropy:.3f}: it looks everywhere alike", entropy
    if not attention.values:
        share, late = layer.of("propagation", head), layer.of("localization", head)
        regime = _regime(share, late)
        unseen = "attention was not measured"
        if regime == SATURATED:
            why = f"its weights predict that signal passes with probability {share:.3f}; {unseen}"
            return "saturated", why, 1 - share
        if regime == UNIFORM:
            return (
                "uniform",
                f"its weights predict that early and late tokens pass alike; {unseen}",
                -abs(late),
            )
    if sink:
        share = layer.of("sink_first", head)
        return "sink", f"the first key receives {share:.2f} of its attention", share
    return "ok", "", 0.0


def _grew(subject: str, before: float, now: float) -> str:
    change = f"from {format_value(before)} to {format_value(now)}"
    return f"{subject} grew {change} over the last third of the kept steps"
