"""The one judge of layers and heads: every threshold with its source, and what is said of a record.

The table, the report, HeadReport, ``inspect`` and the guard share these numbers. Only what was measured flags a
head or a layer; weights alone say at most that nothing was learnt into them yet. A sink, a head that looks at a
position and a sharp one are described: healthy models are full of them (``benchmarks/verdicts.py``).
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_qk.functional.attention import SINK_ATTENTION
from lightning_qk.guard.detectors import Sensitivity
from lightning_qk.record.history import RunRecord
from lightning_qk.record.known_layer import KnownLayer, growing_heads
from lightning_qk.record.newest import Rows

QK_CLIP_LOGIT = 100.0
"""Saturated above it: where Kimi K2 (arXiv 2507.20534) scales query and key weights down."""
DIVERGED_LOGIT = 1e4
"""Every run of Wortsman et al. 2023 (arXiv 2309.14322) with larger attention logits diverged."""
COLLAPSED_ENTROPY = Sensitivity.entropy
"""Below it, in normalized entropy: a layer is saturated, by the mean of its heads, and a head of another layer is
sharp. 0.05, ours. Zhai et al. 2023 (arXiv 2303.06296) give no number."""
SATURATED_PROBABILITY = 0.95
"""The same from here on in the largest probability of a row, unless a sink or the position explains it. Ours."""
FEWEST_TOKENS = 16
"""With fewer tokens no entropy is too low: one key of four is no collapse. Ours."""
ALIKE_COSINE = Sensitivity.cosine
"""Collapsed above it, in the mean cosine of the tokens that leave a layer, over eight measurements, where
attention is uniform besides."""
UNIFORM_ENTROPY = 0.98
"""Uniform above it, in normalized entropy. Ours: attention spread evenly over a share a of n keys has normalized
entropy 1 + ln a / ln n, so that a is over 87 % at n = 1024. Noci et al. 2022 (arXiv 2206.03126) tie uniform
attention to rank collapse; a freshly initialized model is here too."""
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
    "saturated": "logits above 100, or a layer with nearly one key a query",
    "growing": "logits that will pass 110 within five measurements if they go on",
    "collapsed": "attention is uniform and tokens are alike: rank collapse",
    "no data": "nothing was measured",
    "not judged": "attention was not measured: weights alone are no fault",
    "fresh": "weights that do not differ from random ones: nothing was learnt into them yet",
    "uniform": "looks everywhere alike",
    "sharp": "nearly one key a query",
    "positional": "the distance explains more of its logits than the content",
    "sink": "much attention goes to the first key; common in language models",
    "ok": "nothing to say",
}
"""Verdict → what it says: faults, the worst first, then what is no fault."""
FLAGGED = ("non-finite", "saturated", "growing", "collapsed")
"""Faults, by measurement. The other verdicts describe."""
UNJUDGED = ("no data", "not judged")
"""Of which nothing can be said."""


def is_saturated(
    entropy: float,
    max_prob: float,
    *,
    explained: bool = False,
    collapsed: float = COLLAPSED_ENTROPY,
    one_key: float = SATURATED_PROBABILITY,
) -> bool:
    """Whether measured attention lets next to no signal pass: nearly one key a query.

    Args:
        entropy: normalized entropy. NaN is unknown, here and below.
        max_prob: largest probability of a row.
        explained: whether a sink or the position explains a large probability.
        collapsed: threshold of the entropy.
        one_key: threshold of the probability.
    """
    return entropy < collapsed or (max_prob >= one_key and not math.isnan(entropy) and not explained)


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
    tokens = _tokens(entropy, normalized)
    uniform = min((math.log(tokens) + 0.5772 + 0.5 / tokens) / tokens, 1.0)
    return share > max(threshold, uniform + SINK_BEYOND_UNIFORM * (1 - uniform))


def _tokens(entropy: float, normalized: float) -> float:
    """How long sequences were, if causal; NaN where unknown."""
    if not (entropy > 0 and normalized > 0):
        return math.nan
    logarithm = min(entropy / normalized, 100.0)
    tokens = math.e * math.exp(logarithm)
    for _ in range(8):  # Stirling's formula for log(n!) / n, solved for n
        tokens = math.exp(logarithm + 1 - math.log(2 * math.pi * tokens) / (2 * tokens))
    return tokens


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
        eig_var: eigenvalue variance of W_QK; may be negative.
        sym_var: that of its symmetric part, which is not.
        asymmetry: 0 for a symmetric W_QK, 1 for an antisymmetric one.
        entropy_normalized: attention entropy over the log of the number of keys.
        sink_first: attention to the first key.
        max_abs_logit: largest absolute logit of any head.
        linear_share: share of pairs where signal can pass.
        verdict: one of :data:`VERDICTS`, the worst that holds.
        reason: why, with the worst head; empty for ``"ok"``.
    """

    label: str
    eig_mean: float
    eig_var: float
    sym_var: float
    asymmetry: float
    entropy_normalized: float
    sink_first: float
    max_abs_logit: float
    linear_share: float
    verdict: str
    reason: str


def layer_health(record: RunRecord) -> list[LayerHealth]:
    """Judge every layer by its newest statistics.

    Returns:
        One row a layer, in the order of the spectrum's history, then layers that only attention knows.
    """
    layers = _layers(record, (record.spectrum, record.attention))
    is_fresh = _is_fresh(layers)
    return [_judge_layer(layer, is_fresh) for layer in layers]


def head_health(record: RunRecord) -> list[HeadHealth]:
    """Judge every head by its newest statistics, faults first and the worst of them before others.

    Returns:
        One entry a head of every layer that was recorded.
    """
    layers = _layers(record, [h for h in (record.spectrum, record.attention) if h is not None and h.steps])
    is_fresh = _is_fresh(layers)
    found = [row for layer in layers for row in _judge_heads(layer, is_fresh)]
    order = list(VERDICTS)
    return sorted(found, key=lambda row: (order.index(row.verdict), -row.badness))


def healthy_share(record: RunRecord, layers: Collection[str] | None = None) -> float:
    """The share of heads that are not flagged, between 0 and 1; NaN where nothing was measured of any.

    Heads without data, and those of which weights alone are known, do not count. It is what the table of a run
    says, as one number: below 1 a head has a fault, and 0 says that all have.

    Args:
        record: the run.
        layers: labels of the layers that count; None for all.
    """
    known = [
        row
        for row in head_health(record)
        if row.verdict not in UNJUDGED and (layers is None or row.label in layers)
    ]
    return sum(row.verdict not in FLAGGED for row in known) / len(known) if known else math.nan


def _layers(record: RunRecord, histories: Sequence[Any]) -> list[KnownLayer]:
    labels = dict.fromkeys(label for history in histories if history is not None for label in history.layers)
    growing = growing_heads(record.attention)
    rows = {name: Rows(history) for name, history in record.histories.items()}
    return [KnownLayer(label, record, rows, growing.get(label, {})) for label in labels]


def _is_fresh(layers: Sequence[KnownLayer]) -> bool:
    """Whether no layer's weights differ from random ones: a model is fresh as a whole, or not."""
    known = [layer.is_random for layer in layers if layer.is_random is not None]
    return bool(known) and all(known)


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


_MEANS = tuple(
    name
    for name in LayerHealth.__annotations__
    if name not in ("label", "max_abs_logit", "verdict", "reason")
)


def _judge_layer(layer: KnownLayer, is_fresh: bool) -> LayerHealth:
    verdict, reason = _layer_verdict(layer, is_fresh)
    return LayerHealth(
        label=layer.label,
        max_abs_logit=max(layer.all("max_abs_logit"), default=math.nan),
        **{name: layer.mean(name) for name in _MEANS},
        verdict=verdict,
        reason=reason,
    )


def is_one_key(
    numbers: Mapping[str, Sequence[float]],
    *,
    collapsed: float = COLLAPSED_ENTROPY,
    one_key: float = SATURATED_PROBABILITY,
) -> bool:
    """Whether a layer as a whole gives nearly all attention of a query to one key.

    Args:
        numbers: statistic → values of the layer's heads; NaN is unknown.
        collapsed: threshold of the mean entropy.
        one_key: of the mean of the largest probabilities.
    """

    def mean(name: str) -> float:
        known = [value for value in numbers.get(name, ()) if not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan

    rows = list(zip(numbers.get("entropy", ()), numbers.get("entropy_normalized", ()), strict=False))
    tokens = [count for row in rows if not math.isnan(count := _tokens(*row))]
    if tokens and max(tokens) < FEWEST_TOKENS:
        return False
    shares = [value for value in numbers.get("sink_first", ()) if not math.isnan(value)]
    sinks = len(_sinks(numbers))
    explained = bool(sinks) and sinks >= SINK_HEADS * len(shares)
    return is_saturated(
        mean("entropy_normalized"),
        mean("max_prob"),
        explained=explained or mean("positional_share") >= POSITIONAL_SHARE,
        collapsed=collapsed,
        one_key=one_key,
    )


def _sinks(numbers: Mapping[str, Sequence[float]]) -> list[int]:
    """Heads whose first key is a sink."""
    names = ("sink_first", "entropy", "entropy_normalized")
    columns = [numbers.get(name, ()) for name in names]
    count = len(columns[0])
    rows = zip(*(column if len(column) == count else [math.nan] * count for column in columns), strict=True)
    return [head for head, row in enumerate(rows) if is_sink(*row)]


def _is_uniform(layer: KnownLayer) -> bool:
    return layer.mean("entropy_normalized") > UNIFORM_ENTROPY


def _is_collapsed(layer: KnownLayer, is_fresh: bool) -> bool:
    # What a model begins with is no collapse; where tokens become alike, its weights may stay random for that.
    is_alike = layer.cosine >= ALIKE_COSINE and (layer.became_alike or not is_fresh)
    return is_alike and _is_uniform(layer)


def _layer_verdict(layer: KnownLayer, is_fresh: bool) -> tuple[str, str]:
    spectrum, attention = layer.spectrum, layer.attention
    for head, (subject, how) in layer.broken.items():
        return "non-finite", f"{'' if how == 'is infinite' else 'the '}{subject} of head {head} {how}"
    if max(layer.all("max_abs_logit"), default=0.0) > QK_CLIP_LOGIT:
        head, value = layer.worst("max_abs_logit")
        size = f"an absolute logit of {format_value(value)}"
        if value > DIVERGED_LOGIT:
            return "saturated", f"head {head} has {size}: above 1e4 every run of Wortsman et al. diverged"
        return "saturated", f"head {head} has {size}, above the 100 where Kimi K2 clips"
    entropy, top = layer.mean("entropy_normalized"), layer.mean("max_prob")
    if is_one_key(layer.numbers):
        if entropy < COLLAPSED_ENTROPY:
            head, value = layer.worst("entropy_normalized", least=True)
            number = f"normalized entropy {entropy:.3f}, least"
        else:
            head, value = layer.worst("max_prob")
            number = f"largest probability {top:.3f}, most"
        return "saturated", f"mean {number} in head {head} ({value:.3f}): the side of entropy collapse"
    for head, course in layer.growing.items():
        return "growing", _grew(f"the largest |logit| of head {head}", *course)
    if _is_collapsed(layer, is_fresh):
        return "collapsed", (
            f"mean normalized entropy {entropy:.3f}, and tokens with a mean cosine of {layer.cosine:.3f} leave it"
        )
    if attention.missing and not attention.is_measured:
        return "no data", attention.missing
    if attention.values and not attention.is_measured:
        unknown = "every attention statistic is NaN: NaN logits, or the layer did not run"
        why = unknown if attention.states is None else "at no row of it attention has a value"
        return "no data", attention.missing or why
    if not attention.values and not spectrum.is_measured and not spectrum.has_no_value:
        return "no data", spectrum.missing or "nothing was recorded"
    if is_fresh:
        return "fresh", attention.missing
    if not attention.values:
        return "not judged", attention.missing or "attention was not measured"
    if _is_uniform(layer):
        head, value = layer.worst("entropy_normalized")
        return "uniform", (
            f"mean normalized entropy {entropy:.3f}, most in head {head} ({value:.3f})"
            + _what_uniform_means(layer)
        )
    sinks = _sinks(layer.numbers)
    if sinks and len(sinks) >= SINK_HEADS * len(layer.all("sink_first")):
        head, value = layer.worst("sink_first")
        return (
            "sink",
            f"{len(sinks)} of {layer.heads} heads give the first key over 0.3, most head {head} ({value:.2f})",
        )
    return "ok", attention.missing


def _what_uniform_means(layer: KnownLayer) -> str:
    if math.isnan(layer.cosine):
        return ""
    return f": tokens of mean cosine {layer.cosine:.2f} leave it, which is no rank collapse"


def _judge_heads(layer: KnownLayer, is_fresh: bool) -> Iterator[HeadHealth]:
    whole = is_one_key(layer.numbers), _is_collapsed(layer, is_fresh), is_fresh, _sinks(layer.numbers)
    for head in range(layer.heads):
        yield HeadHealth(layer.label, head, *_head_verdict(layer, head, *whole))


def _head_verdict(
    layer: KnownLayer,
    head: int,
    in_one_key: bool,
    in_collapsed: bool,
    is_fresh: bool,
    sinks: Collection[int],
) -> tuple[str, str, float]:
    """Verdict, reason and badness."""
    spectrum, attention = layer.spectrum, layer.attention
    if head in layer.broken:
        return "non-finite", f"its {' '.join(layer.broken[head])}", 0.0
    if all(math.isnan(layer.of(name, head)) for name in (*spectrum.values, *attention.values)):
        if spectrum.has_no_value and not attention.missing:
            return "ok", "", 0.0
        return "no data", attention.missing or spectrum.missing or "nothing is known of it", 0.0
    logit, entropy = layer.of("max_abs_logit", head), layer.of("entropy_normalized", head)
    if logit > QK_CLIP_LOGIT:
        source = "100, where Kimi K2 clips"
        if logit > DIVERGED_LOGIT:
            source = "1e4, where every run of Wortsman et al. diverged"
        return "saturated", f"its largest |logit| is {format_value(logit)}, above {source}", logit
    sink, top = head in sinks, layer.of("max_prob", head)
    positional = layer.of("positional_share", head)
    is_sharp = is_saturated(entropy, top)
    number = f"normalized entropy {entropy:.3f}, largest probability {top:.3f}"
    if math.isnan(top):
        number = f"normalized entropy {entropy:.3f}"
    if in_one_key and is_sharp:
        return "saturated", f"{number}: nearly one key a query, as in its whole layer", 1 - entropy
    if head in layer.growing:
        before, now = layer.growing[head]
        return "growing", _grew("its largest |logit|", before, now), now / max(before, 1e-30)
    if in_collapsed and entropy > UNIFORM_ENTROPY:
        return "collapsed", f"normalized entropy {entropy:.3f}, and tokens become alike", entropy
    if is_fresh:
        return "fresh", "its weights do not differ from random ones", 0.0
    if not attention.values:
        return "not judged", attention.missing or "attention was not measured", 0.0
    if entropy > UNIFORM_ENTROPY:
        return "uniform", f"normalized entropy {entropy:.3f}: it looks everywhere alike", entropy
    if sink:
        share = layer.of("sink_first", head)
        return "sink", f"the first key receives {share:.2f} of its attention", share
    if positional >= POSITIONAL_SHARE:
        return "positional", f"the distance explains {positional:.2f} of its logits", positional
    if is_sharp:
        return "sharp", f"{number}: nearly one key a query", 1 - entropy
    return "ok", "", 0.0


def _grew(subject: str, before: float, now: float) -> str:
    change = f"from {format_value(before)} to {format_value(now)}"
    return f"{subject} grew {change} over the newest kept steps"
