"""Rules by which a head is classed, in a fixed order."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_qk.functional.attention import SINK_ATTENTION
from lightning_qk.record.verdicts import (
    COLLAPSED_ENTROPY,
    DEAD_OUTPUT,
    POSITIONAL_SHARE,
    QK_CLIP_LOGIT,
    SATURATED_PROBABILITY,
    UNIFORM_ENTROPY,
    is_saturated,
    is_sink,
)

KINDS = ("dead", "saturated", "diffuse", "sink", "positional", "sharp", "semantic", "unknown")
"""The classes, in the order in which they are tried; the first that holds is the head's."""

NUMBERS = (
    "entropy_normalized",
    "max_prob",
    "logit_std",
    "sink_first",
    "sink_top",
    "sink_rate",
    "positional_share",
    "output",
    "weight",
    "eig_var",
)
"""Numbers of a head in a report; any of them may be NaN."""

HELPERS = ("entropy", "max_abs_logit", "in_one_key")
"""What classing uses besides, where it is known; ``in_one_key`` is 1 where the whole layer gives one key."""


@dataclass(frozen=True)
class HeadThresholds:
    """Where one class ends and another begins.

    The rules are tried in the order of :data:`KINDS`, and the first that holds decides. Defaults and their sources
    are those of all verdicts, in ``lightning_qk.record.verdicts``:

    - dead: ``output`` is at most ``dead``; where it is not known, ``weight`` is.
    - saturated, the one class that is a fault: the largest absolute logit is above 100, or the head is sharp and
      the mean of its layer is, too.
    - diffuse: ``entropy_normalized`` is above ``diffuse``.
    - sink: ``sink_first`` or ``sink_top`` is above ``sink``, and well above what uniform attention gives.
    - positional: ``positional_share`` is at least ``positional``.
    - sharp: ``max_prob`` is at least ``saturated`` or ``entropy_normalized`` below ``collapsed``: content alone
      decides on one key, which single heads of healthy models do.
    - semantic: what is left, and ``positional_share`` is known.
    - unknown: what is left.

    So a head that always looks one token back is positional, however sharp it is, and one that always looks at
    the first token is a sink.

    Attributes:
        dead: of ``output``, and of ``weight`` where values are not known.
        diffuse: of ``entropy_normalized``.
        sink: of ``sink_first`` and ``sink_top``.
        positional: of ``positional_share``.
        saturated: of ``max_prob``.
        collapsed: of ``entropy_normalized``.

    Raises:
        ValueError: a threshold is not between 0 and 1.
    """

    dead: float = DEAD_OUTPUT
    diffuse: float = UNIFORM_ENTROPY
    sink: float = SINK_ATTENTION
    positional: float = POSITIONAL_SHARE
    saturated: float = SATURATED_PROBABILITY
    collapsed: float = COLLAPSED_ENTROPY

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(
                    f"expected a threshold {name!r} between 0 and 1, got {value}: all are shares"
                )


def classify(numbers: Mapping[str, float], thresholds: HeadThresholds | None = None) -> tuple[str, str]:
    """Class one head.

    Args:
        numbers: those of :data:`NUMBERS` and :data:`HELPERS` that are known.
        thresholds: None for the defaults.

    Returns:
        One of :data:`KINDS`, and the sentence of numbers that says why.
    """
    limits = thresholds or HeadThresholds()
    known = dict.fromkeys((*NUMBERS, *HELPERS), math.nan) | dict(numbers)  # no comparison with NaN holds
    output, entropy, spread = known["output"], known["entropy_normalized"], known["logit_std"]
    first, top, position = known["sink_first"], known["sink_top"], known["positional_share"]
    sharp = is_saturated(entropy, known["max_prob"], collapsed=limits.collapsed, one_key=limits.saturated)
    largest = known["max_prob"]
    one_key = f"one key takes {largest:.3f}, normalized entropy {entropy:.3f}, logits spread by {spread:.3g}"
    if output <= limits.dead:
        return "dead", f"its output has {output:.1e} of the norm of its layer's largest"
    if math.isnan(output) and known["weight"] <= limits.dead:
        return "dead", f"its W_QK has {known['weight']:.1e} of the norm of its layer's largest"
    if known["max_abs_logit"] > QK_CLIP_LOGIT:
        return "saturated", f"its largest |logit| is {known['max_abs_logit']:.4g}, above 100"
    if sharp and known["in_one_key"] == 1:
        return "saturated", f"{one_key}, as in its whole layer"
    if entropy > limits.diffuse:
        logits = "" if math.isnan(spread) else f", logits spread by {spread:.3g}"
        return "diffuse", f"normalized entropy {entropy:.3f}{logits}"
    if is_sink(first, known["entropy"], entropy, threshold=limits.sink):
        return "sink", f"the first key receives {first:.2f}"
    if is_sink(top, known["entropy"], entropy, threshold=limits.sink):
        return "sink", f"one key of a sequence receives {top:.2f}, the first {first:.2f}"
    if position >= limits.positional:
        return "positional", f"the offset explains {position:.2f} of its logits"
    if sharp:
        return "sharp", one_key
    if position < limits.positional:
        reason = f"the offset explains {position:.2f} of its logits, normalized entropy {entropy:.3f}"
        return "semantic", reason
    return "unknown", "the share of position in its logits is not known"
