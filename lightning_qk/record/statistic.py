"""One entry of the registry of statistics."""

from dataclasses import dataclass

from lightning_qk.record.families import OTHER

ALWAYS, WITH_ROOM = "always", "with room"
"""When the report draws a statistic."""


@dataclass(frozen=True)
class Statistic:
    """What is known of a statistic besides its values.

    Attributes:
        group: prefix of its log keys.
        name: the rest.
        title: what it is, in a few words.
        meaning: what its values mean, in sentences.
        worry: when to worry: the end of "when"; empty where no value is a fault by itself.
        unit: its unit, or an empty string. An unscaled logit is one of tokens of variance 1, before the softmax
            scale; with it logits are in nats.
        share: it lies between 0 and 1, and is drawn on that scale.
        signed: zero is its middle, and is drawn as the middle colour.
        peak: of several heads the largest counts, not the mean.
        log: dashboards draw it on a logarithmic axis.
        drawn: ``ALWAYS``, ``WITH_ROOM`` (where the page has room) or empty: not in the report.
        instead_of: a statistic in whose place it is drawn where that one was not recorded.
        extremes: which of ``min`` and ``max`` over all heads loggers get beside the mean.
        per_layer: it is logged for every layer unless others are asked for.
        heatmap: it is logged as a layer × head picture.
        family: one of :data:`~lightning_qk.record.families.FAMILIES`.
    """

    group: str
    name: str
    title: str
    meaning: str = ""
    worry: str = ""
    unit: str = ""
    share: bool = False
    signed: bool = False
    peak: bool = False
    log: bool = False
    drawn: str = ""
    instead_of: str = ""
    extremes: tuple[str, ...] = ()
    per_layer: bool = False
    heatmap: bool = False
    family: str = OTHER

    @property
    def label(self) -> str:
        """Title and unit, for an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title
