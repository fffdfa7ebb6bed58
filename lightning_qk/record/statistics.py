"""The registry of statistics: what each means, when to worry, how it is drawn and what of it is logged.

The report, the figures, the loggers and the docs read it. A new statistic is one line of a table
(``_weights_table.py``, ``_runs_table.py``) and the function that computes it.
"""

from collections.abc import Iterable
from dataclasses import replace

from lightning_qk.record._runs_table import OF_RUNS
from lightning_qk.record._weights_table import OF_WEIGHTS
from lightning_qk.record.families import OTHER
from lightning_qk.record.statistic import ALWAYS, WITH_ROOM, Statistic

RUN_GROUPS = {
    "spectrum": "qk",
    "tokens": "qk/tokens",
    "attention": "attn",
    "sinks": "attn",
    "position": "attn",
}
"""History of a record → prefix of its log keys, where they differ."""

PREDICTED = (
    "entropy_normalized",
    "entropy",
    "sink_first",
    "linear_share",
    "logit_std",
    "distance",
    "distance_spread",
    "max_prob",
    "diagonal",
    "participation",
    "sink_rate",
)
"""Statistics that are predicted: means, which do not depend on how many rows are seen as maxima do."""

SEMANTIC_SHARE = "semantic_share"
"""What the moments do not explain."""


_SEMANTIC_SHARE = Statistic(
    "pred",
    SEMANTIC_SHARE,
    "what token moments do not explain",
    "The share of attention that has to be moved, at least, to come from the attention that the moments of "
    "queries and keys predict to the measured one: what tokens say to each other beyond their statistics.",
    unit="share of attention",
    share=True,
    drawn=ALWAYS,
    extremes=("max",),
    family="predictions",
)


def _predicted(one: Statistic) -> Statistic:
    """A statistic of attention as what a layer's token moments predict of it."""
    return replace(
        one,
        group="pred",
        family="predictions",
        title=f"predicted {one.title}",
        meaning="What independent Gaussian tokens with the layer's own moments of queries and keys would give. "
        f"{one.meaning}",
        worry="",
        drawn=ALWAYS if one.name == "entropy_normalized" else WITH_ROOM,
        instead_of="",
        extremes=(),
        per_layer=False,
        heatmap=False,
    )


_ALL = (
    *OF_WEIGHTS,
    *OF_RUNS,
    _SEMANTIC_SHARE,
    *(_predicted(one) for one in OF_RUNS if one.group == "attn" and one.name in PREDICTED),
)

STATISTICS = {f"{one.group}/{one.name}": one for one in _ALL}
"""Log key without its place and reduction → statistic."""


def describe(statistic: str, group: str = "") -> Statistic:
    """What is known of a statistic, also of one that is not in the registry and the standard error of one that is.

    Args:
        statistic: its name.
        group: the history or the prefix of the log keys it belongs to; without, the first of that name is taken.
    """
    prefix = RUN_GROUPS.get(group, group)
    found = [one for one in _ALL if one.name == statistic and prefix in ("", one.group)]
    if found:
        return found[0]
    if statistic.endswith("_se"):
        base = describe(statistic.removesuffix("_se"), group)
        title = f"standard error of {base.title}"
        return Statistic(prefix, statistic, title, unit=base.unit, family=base.family)
    offset, _, name = statistic.partition("/")
    if offset.startswith("offset_") and name:
        base = describe(name, group)
        return replace(
            base, name=statistic, title=f"{base.title}, keys {offset.removeprefix('offset_')} before"
        )
    # Of a group with one family every statistic is in it.
    families = {one.family for one in _ALL if one.group == prefix}
    family = families.pop() if len(families) == 1 else OTHER
    return Statistic(prefix, statistic, statistic.replace("_", " "), family=family)


def of_key(key: str) -> Statistic | None:
    """The statistic that a log key is of, whatever layer, head, loop or reduction it names; None where unknown."""
    group, *parts = key.split("/")
    if key.startswith("qk/tokens/"):
        group, parts = "qk/tokens", parts[1:]
    names = (f"{group}/{part}" for part in (*parts[:1], *parts[::-1]))
    return next((STATISTICS[name] for name in names if name in STATISTICS), None)


def drawn_statistics(group: str, recorded: Iterable[str], *, with_room: bool = True) -> list[str]:
    """Which of the recorded statistics of a history the report draws, in order.

    Args:
        group: the history.
        recorded: names of statistics that have a value.
        with_room: also those that are drawn where there is room.
    """
    recorded = list(recorded)
    has, prefix = set(recorded), RUN_GROUPS.get(group, group)
    own = [one for one in _ALL if one.group == prefix]
    if not own:
        return list(recorded)
    found = []
    for one in own:
        if one.drawn == ALWAYS:
            names = (one.name, *(other.name for other in own if other.instead_of == one.name))
            found += [name for name in names if name in has][:1]
    rest = [one.name for one in own if one.drawn == WITH_ROOM and one.name in has and one.name not in found]
    return found + rest * with_room


def logged_extremes(group: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Statistic → which of ``min`` and ``max`` loggers get, of those that have any."""
    return {name: extremes for name in names if (extremes := describe(name, group).extremes)}


def logged_by_layer(group: str, names: Iterable[str]) -> tuple[str, ...]:
    """Statistics that are logged for every layer unless others are asked for."""
    return tuple(name for name in names if describe(name, group).per_layer)


def logged_as_heatmap(group: str, names: Iterable[str]) -> tuple[str, ...]:
    """Statistics that are logged as layer × head pictures."""
    return tuple(name for name in names if describe(name, group).heatmap)
