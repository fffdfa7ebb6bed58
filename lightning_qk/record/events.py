"""Events of a run, one JSON object a line, in a file that a program can follow while the run goes on."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

EVENTS_NAME = "lightning_qk_events.jsonl"

KINDS = {
    "start": "a run begins; lines before it are another's",
    "resume": "the run goes on from a checkpoint; steps that follow may have been done before",
    "alarm": "CollapseGuard warns; the value is its score, which alarms from the threshold on",
    "remedy": "what CollapseGuard did then",
    "clip": "QKClip scaled a layer for the first time; the value is the logit that it had",
    "cap": "UpdateCap scaled an update of a layer for the first time; the value is the ratio that it had",
    "non-finite": "weights, logits or hidden states are NaN or infinite for the first time",
    "skipped": "something is left out, for the reason in the message",
    "note": "anything else that was said",
}
"""Kind → what it says."""
_SAID_ONCE = ("skipped", "note")
"""Kinds of which a run has the same sentence once, whenever it comes again."""
_FIRST_TIMES = ("clip", "cap", "non-finite")
"""Kinds of which a run has one a callback and layer."""
_MOST_WAITING = 1000


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        step: the optimizer step as loggers count it.
        kind: one of :data:`KINDS`.
        source: the callback, with its name where it has one.
        message: a sentence.
        where: the layer by its label in log keys, or a head of it, as in ``layer_03/head_05``; empty for the run.
        value: the number that it is about; NaN for none.
        threshold: what that number was compared with; NaN for none.
        time: when, in ISO 8601, UTC; empty for an event that was read from a checkpoint.
    """

    step: int
    kind: str
    source: str
    message: str
    where: str = ""
    value: float = math.nan
    threshold: float = math.nan
    time: str = field(default_factory=_now)

    @classmethod
    def from_state(cls, state: Any) -> "Event":
        """An event of a checkpoint; older ones have a step and a sentence alone."""
        if isinstance(state, Mapping):
            return cls(**state, time="")
        step, sentence = state
        source = str(sentence).partition(" ")[0].rstrip(":")
        return cls(int(step), "note", source, str(sentence), time="")

    def state_dict(self) -> dict[str, Any]:
        """Plain values, without the time: checkpoints of equal runs are equal."""
        state = asdict(self)
        del state["time"]
        return state

    def line(self) -> str:
        """One line of JSON. What is empty, or no finite number, is null."""
        values = asdict(self)
        order = ("step", "time", "kind", "source", "where", "value", "threshold", "message")
        return json.dumps({name: _json(values[name]) for name in order}, ensure_ascii=False) + "\n"


def _json(value: Any) -> Any:
    is_number = isinstance(value, float)
    return None if value == "" or (is_number and not math.isfinite(value)) else value


def _identity(step: Any, kind: Any, source: Any, where: Any, message: Any) -> tuple[Any, ...]:
    """What identifies an event: a run resumed from a checkpoint repeats some steps."""
    if kind in _SAID_ONCE:
        return kind, source, message
    if kind in _FIRST_TIMES:
        return kind, source, str(where or "").partition("/")[0]
    # Numbers of a step that is done again may differ in their last digits.
    return kind, source, step, message if kind == "remedy" else ""


class EventFile:
    """Appends events to a file, each once. Nothing raises: what cannot be written waits for the next event.

    Args:
        path: the file. It comes with the first event.
        resumes: step at which the run goes on; None where it begins.

    Attributes:
        problem: why events could not be written, the newest time; None where all are there.
    """

    def __init__(self, path: str | Path, resumes: int | None = None) -> None:
        self.path = Path(path)
        self.problem: str | None = None
        self._resumes = resumes
        self._known: set[tuple[Any, ...]] = set()
        self._is_open = False
        self._waiting: list[str] = []

    def add(self, events: Iterable[Event]) -> None:
        """Append those that are not in the run's part of the file yet."""
        for event in events:
            self._open(event)
            identity = _identity(event.step, event.kind, event.source, event.where, event.message)
            if identity not in self._known:
                self._known.add(identity)
                self._waiting.append(event.line())
        if self._waiting:
            del self._waiting[:-_MOST_WAITING]
            self._write()

    def _open(self, first: Event) -> None:
        if self._is_open:
            return
        self._is_open = True
        if self._resumes is None:
            self._waiting.append(Event(first.step, "start", "lightning-qk", KINDS["start"]).line())
            return
        own: list[dict[str, Any]] = []
        for found in read_events(self.path):
            own = [] if found["kind"] == "start" else [*own, found]
        self._known = {
            _identity(*(found.get(name) for name in ("step", "kind", "source", "where", "message")))
            for found in own
        }
        self._waiting.append(Event(self._resumes, "resume", "lightning-qk", KINDS["resume"]).line())

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(self._waiting)
            with self.path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, 2)
                    # Of a process that was killed in mid-line, or a disk that was full.
                    text = text if file.read(1) == b"\n" else f"\n{text}"
                file.write(text.encode())
        except (OSError, ValueError) as error:
            self.problem = " ".join(str(error).split()) or type(error).__name__
        else:
            self._waiting, self.problem = [], None


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """The events of a file, oldest first, as :meth:`Event.line` writes them; none where there is no file.

    A line that is not whole, such as one that is being written, is left out.

    Args:
        path: the file.
    """
    try:
        lines = Path(path).read_bytes().decode(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "kind" in event:
            found.append(event)
    return found
