"""Rules by which a head is classed, in a fixed order."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_qk.functional.attention import SINK_ATTENTION
from lightning_qk.record.verdicts import (
    COLLAPSED_ENTROPY,
    DEAD_OUTPUT,
    POSITIONAL_SHARE,
    SATURATED_PROBABILITY,
    UNIFORM_ENTROPY,
    is_saturated,
    is_sink,
)

KINDS = ("dead", "diffuse", "sink", "positional", "saturated", "semantic", "unknown")
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
    "propagation",
)
"""Numbers of a head in a report; any of them may be NaN."""

HELPERS = ("entropy", "max_abs_logit")
"""What classing uses besides, where it is known."""


@dataclass(frozen=True)
class HeadThresholds:
    """Where one class ends and another begins.

    The rules are tried in the order of :data:`KINDS`, and the first that holds decides. Defaults and their sources
    are those of all verdicts, in ``lightning_qk.record.verdicts``:

    - dead: ``output`` is at most ``dead``; where it is not known, ``weight`` is.
    - diffuse: ``entropy_normalized`` is above ``diffuse``.
    - sink: ``sink_first`` or ``sink_top`` is above ``sink``, and well above what uniform attention gives.
    - positional: ``positional_share`` is at least ``positional``.
    - saturated: ``max_prob`` is at least ``saturated``, ``entropy_normalized`` below ``collapsed``, or the largest
      absolute logit above 100: content alone decides on one key.
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
    predicted = known["propagation"]
    propagation = "" if math.isnan(predicted) else f", predicted signal propagation {predicted:.2f}"
    if output <= limits.dead:
        return "dead", f"its output has {output:.1e} of the norm of its layer's largest"
    if math.isnan(output) and known["weight"] <= limits.dead:
        return "dead", f"its W_QK has {known['weight']:.1e} of the norm of its layer's largest"
    if entropy > limits.diffuse:
        logits = "" if math.isnan(spread) else f", logits spread by {spread:.3g}"
        return "diffuse", f"normalized entropy {entropy:.3f}{logits}{propagation}"
    if is_sink(first, known["entropy"], entropy, threshold=limits.sink):
        return "sink", f"the first key receives {first:.2f}"
    if is_sink(top, known["entropy"], entropy, threshold=limits.sink):
        return "sink", f"one key of a sequence receives {top:.2f}, the first {first:.2f}"
    if position >= limits.positional:
        return "positional", f"the offset explains {position:.2f} of its logits"
    if is_saturated(
        entropy,
        known["max_prob"],
        known["max_abs_logit"],
        collapsed=limits.collapsed,
        one_key=limits.saturated,
    ):
        return "saturated", (
            f"one key takes {known['max_prob']:.3f}, normalized entropy {entropy:.3f}, logits spread by "
            f"{spread:.3g}{propagation}"
        )
    if position < limits.positional:
        reason = f"the offset explains {position:.2f} of its logits, normalized entropy {entropy:.3f}"
        return "semantic", reason
    return "unknown", "the share of position in its logits is not known"
