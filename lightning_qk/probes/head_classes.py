"""Rules by which a head is classed, in a fixed order."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

KINDS = ("dead", "diffuse", "sink", "positional", "saturated", "semantic", "unknown")
"""The classes, in the order in which they are asked for; the first that holds is the head's."""

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
"""What is known of a head; any of them may be NaN."""


@dataclass(frozen=True)
class HeadThresholds:
    """Where one class ends and another begins.

    The rules are asked in the order of :data:`KINDS`, and the first that holds decides:

    - dead: ``output`` is at most ``dead``; where it is not known, ``weight`` is. Ours.
    - diffuse: ``entropy_normalized`` is at least ``diffuse``. Ours: attention over 1,024 keys is then as wide as
      that spread evenly over 70 % of them.
    - sink: ``sink_first`` or ``sink_top`` is above ``sink``, the attention from which Gu et al. 2024 (arXiv
      2410.10781) call a key a sink [V].
    - positional: ``positional_share`` is at least ``positional``: the offset explains more of the logits than
      content does. Ours, after the distinction of Cui et al. 2024 (arXiv 2402.03902).
    - saturated: ``max_prob`` is at least ``saturated``, or ``entropy_normalized`` at most ``collapsed``: content
      alone decides on one key. Ours; the side of entropy collapse (Zhai et al. 2023, arXiv 2303.06296).
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

    dead: float = 1e-3
    diffuse: float = 0.95
    sink: float = 0.3
    positional: float = 0.5
    saturated: float = 0.95
    collapsed: float = 0.05

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(
                    f"expected a threshold {name!r} between 0 and 1, got {value}: all are shares"
                )


def classify(numbers: Mapping[str, float], thresholds: HeadThresholds | None = None) -> tuple[str, str]:
    """Class one head.

    Args:
        numbers: those of :data:`NUMBERS` that are known.
        thresholds: None for the defaults.

    Returns:
        One of :data:`KINDS`, and the sentence of numbers that says why.
    """
    limits = thresholds or HeadThresholds()
    known = _Numbers(numbers)
    for kind, rule in _RULES:
        reason = rule(known, limits)
        if reason is not None:
            return kind, reason
    return "unknown", "the share of position in its logits is not known"


class _Numbers:
    """NaN for what is not known: no comparison with it holds."""

    def __init__(self, numbers: Mapping[str, float]) -> None:
        self._numbers = numbers

    def __getattr__(self, name: str) -> float:
        return self._numbers.get(name, math.nan)


def _dead(head: _Numbers, limits: HeadThresholds) -> str | None:
    if head.output <= limits.dead:
        return f"its output has {head.output:.1e} of the norm of its layer's largest"
    if math.isnan(head.output) and head.weight <= limits.dead:
        return f"its W_QK has {head.weight:.1e} of the norm of its layer's largest"
    return None


def _diffuse(head: _Numbers, limits: HeadThresholds) -> str | None:
    if head.entropy_normalized >= limits.diffuse:
        spread = "" if math.isnan(head.logit_std) else f", logits spread by {head.logit_std:.3g}"
        return f"normalized entropy {head.entropy_normalized:.3f}{spread}{_propagation(head)}"
    return None


def _sink(head: _Numbers, limits: HeadThresholds) -> str | None:
    if head.sink_first > limits.sink:
        return f"the first key receives {head.sink_first:.2f}"
    if head.sink_top > limits.sink:
        return f"one key of a sequence receives {head.sink_top:.2f}, the first {head.sink_first:.2f}"
    return None


def _positional(head: _Numbers, limits: HeadThresholds) -> str | None:
    if head.positional_share >= limits.positional:
        return f"the offset explains {head.positional_share:.2f} of its logits"
    return None


def _saturated(head: _Numbers, limits: HeadThresholds) -> str | None:
    if head.max_prob >= limits.saturated or head.entropy_normalized <= limits.collapsed:
        return (
            f"one key takes {head.max_prob:.3f}, normalized entropy {head.entropy_normalized:.3f}, logits spread "
            f"by {head.logit_std:.3g}{_propagation(head)}"
        )
    return None


def _semantic(head: _Numbers, limits: HeadThresholds) -> str | None:
    if head.positional_share < limits.positional:
        return (
            f"the offset explains {head.positional_share:.2f} of its logits, normalized entropy "
            f"{head.entropy_normalized:.3f}"
        )
    return None


def _propagation(head: _Numbers) -> str:
    """What the weights predict, where they are known."""
    return "" if math.isnan(head.propagation) else f", predicted signal propagation {head.propagation:.2f}"


_RULES: tuple[tuple[str, Callable[[_Numbers, HeadThresholds], str | None]], ...] = (
    ("dead", _dead),
    ("diffuse", _diffuse),
    ("sink", _sink),
    ("positional", _positional),
    ("saturated", _saturated),
    ("semantic", _semantic),
)
