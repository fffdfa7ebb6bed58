"""The file of events: whole lines, each event once, whatever happened to the file before."""

import json
import math
from datetime import datetime
from pathlib import Path

import pytest

from lightning_qk.record.events import KINDS, Event, EventFile, read_events

CLIP = Event(3, "clip", "QKClip", "clipped", "layer_00/head_01", 120.0, 100.0)
ALARM = Event(5, "alarm", "CollapseGuard", "too large", "layer_00", math.inf, 1.0)


def kinds(path: Path) -> list[str]:
    return [event["kind"] for event in read_events(path)]


def test_a_line_is_an_object_with_the_fields_of_the_page(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    EventFile(path).add([CLIP, ALARM])
    lines = path.read_text().splitlines()
    start, clip, alarm = (json.loads(line) for line in lines)
    assert list(clip) == ["step", "time", "kind", "source", "where", "value", "threshold", "message"]
    assert datetime.fromisoformat(clip["time"]).utcoffset().total_seconds() == 0  # type: ignore[union-attr]
    assert {
        name: clip[name] for name in ("step", "kind", "source", "where", "value", "threshold", "message")
    } == {
        "step": 3,
        "kind": "clip",
        "source": "QKClip",
        "where": "layer_00/head_01",
        "value": 120.0,
        "threshold": 100.0,
        "message": "clipped",
    }
    assert start["kind"] == "start"
    assert start["where"] is None
    assert alarm["value"] is None  # JSON has no infinity
    page = (Path(__file__).parents[2] / "docs" / "loggers.md").read_text()
    for name in (*clip, *KINDS):
        assert f"`{name}`" in page, name


def test_an_event_is_written_once(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "events")
    file.add([CLIP])
    # A layer's first clip again after a resume, and the same note at another step.
    file.add([Event(7, "clip", "QKClip", "clipped again", "layer_00/head_02", 120.1, 100.0)])
    file.add([Event(3, "skipped", "A", "no weights"), Event(9, "skipped", "A", "no weights")])
    file.add([ALARM, Event(5, "alarm", "CollapseGuard", "too large, by another digit", "layer_00")])
    assert kinds(file.path) == ["start", "clip", "skipped", "alarm"]
    file.add([Event(4, "clip", "QKClip", "clipped", "layer_01"), Event(6, "alarm", "CollapseGuard", "a")])
    assert kinds(file.path)[4:] == ["clip", "alarm"]


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "events"
    EventFile(path).add([CLIP, ALARM])
    EventFile(path, resumes=4).add(
        [CLIP, Event(5, "alarm", "CollapseGuard", "again", "layer_00"), Event(8, "note", "A", "b")]
    )
    assert kinds(path) == ["start", "clip", "alarm", "resume", "note"]
    assert read_events(path)[3]["step"] == 4


def test_another_run_in_the_folder_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "events"
    EventFile(path).add([CLIP])
    EventFile(path).add([CLIP])
    assert kinds(path) == ["start", "clip", "start", "clip"]
    EventFile(path, resumes=4).add([CLIP])
    assert kinds(path) == ["start", "clip", "start", "clip", "resume"]


def test_a_resumed_run_in_another_folder_has_what_its_checkpoint_had(tmp_path: Path) -> None:
    path = tmp_path / "events"
    EventFile(path, resumes=6).add([Event.from_state(CLIP.state_dict())])
    assert kinds(path) == ["resume", "clip"]
    found = read_events(path)[1]
    assert found["time"] is None  # which it does not have
    assert (found["step"], found["value"], found["message"]) == (3, 120.0, "clipped")


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "events"
    EventFile(path).add([CLIP])
    path.write_bytes(path.read_bytes()[:-20])
    EventFile(path, resumes=4).add([ALARM])
    assert kinds(path) == ["start", "resume", "alarm"]


def test_what_cannot_be_written_waits(tmp_path: Path) -> None:
    path = tmp_path / "events"
    path.mkdir()
    file = EventFile(path)
    file.add([CLIP])
    assert file.problem
    path.rmdir()
    file.add([ALARM])
    assert file.problem is None
    assert kinds(path) == ["start", "clip", "alarm"]


def test_events_of_older_checkpoints() -> None:
    event = Event.from_state((7, "QKClip clipped layer_00 for the first time"))
    assert (event.step, event.kind, event.source) == (7, "note", "QKClip")
    assert event.message == "QKClip clipped layer_00 for the first time"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe{", b"[1]\n{}\nnull\n"])
def test_what_is_no_event_is_left_out(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "events"
    path.write_bytes(content)
    assert read_events(path) == []
    EventFile(path).add([CLIP])
    assert kinds(path) == ["start", "clip"]
