"""What to do where attention is at fault, and after an alarm: a sentence or two a verdict."""

import re
from typing import NamedTuple

from lightning_qk.record.history import RunRecord

ADVICE = {
    "non-finite": "Go back to a checkpoint before it, with a smaller learning rate; float16 overflows where "
    "bfloat16 does not.",
    "saturated": "Lower the learning rate or lengthen the warm-up. QKClip() keeps logits below 100; in a new "
    "model norms of queries and keys (qk-norm) do.",
    "growing": "Lower the learning rate before logits pass 100, or add QKClip(), which holds them.",
    "collapsed": "Go back to a checkpoint before it, with a longer warm-up or a smaller learning rate. "
    "CollapseGuard() warns of it.",
    "no data": "Nothing, if these layers are not meant to run; else look at the reason.",
    "not judged": "Measure attention: add AttentionMonitor() to the trainer's callbacks, or pass --text to "
    "lightning-qk inspect.",
    "fresh": "Nothing yet: look again after some hundred steps.",
    "uniform": "Nothing in the first steps. Where it stays after the warm-up, HiddenStateMonitor() tells over "
    "eight measurements whether tokens become alike, which is rank collapse.",
    "sharp": "Nothing for single heads. The entropy of their layer, over time, should not fall towards 0.",
    "positional": "Nothing: heads that look at a distance are common.",
    "sink": "Nothing: common in language models.",
}
"""Verdict → what to do."""

ALARM_ADVICE = (
    "Look at the layer's curves at that step. Where the loss has suffered, go back to a checkpoint before it with "
    'a smaller learning rate; CollapseGuard(rollback=True, lr_factor=0.5) or action="qk_clip" does so by itself.'
)
"""What to do after an alarm of the guard."""

_GUARD = "CollapseGuard: "


class Alarm(NamedTuple):
    """An alarm of the guard.

    Attributes:
        step: when it was given.
        sentence: what it said, without the guard's name.
        label: the layer that it named, as the record calls it; empty where it named none that was recorded.
        head: the head, or None.
    """

    step: int
    sentence: str
    label: str
    head: int | None


def guard_alarms(record: RunRecord) -> list[Alarm]:
    """The alarms of a run, oldest first, with what they named."""
    heads = {
        label: count
        for history in reversed(list(record.histories.values()))
        for label, count in zip(history.layers, history.heads, strict=True)
    }
    # The longest first: a label may begin as another does.
    labels = sorted(heads, key=len, reverse=True)
    found = []
    for step, sentence in record.events:
        if not sentence.startswith(_GUARD):
            continue
        said = sentence.removeprefix(_GUARD)
        label = next(
            (one for one in labels if re.search(rf"(?<![\w.]){re.escape(one)}(?![\w.]*\w)", said)), ""
        )
        number = re.search(r"\bhead (\d+) of ", said)
        head = int(number[1]) if number and label and int(number[1]) < heads[label] else None
        found.append(Alarm(step, said, label, head))
    return found
