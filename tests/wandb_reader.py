"""Read an offline W&B run back from its ``.wandb`` file.

The file is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB that hold records of
(CRC32 4 bytes, length 2 bytes, type 1 byte, data). A record that does not fit a block is split into a first,
middle and last part. Each whole record is one protobuf message. wandb 0.31 ships the messages and no
reader for the log.
"""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HEADER, _BLOCK = 7, 32768
# Seconds to wait for what wandb's service writes.
_TIMEOUT = 60.0
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class WandbRun:
    """What an offline run holds.

    Attributes:
        history: rows in the order they were logged, key → value; a dict for an image or a histogram.
        config: the run's configuration.
        files: paths of the run's files, such as images, relative to its ``files`` folder.
        metrics: name or glob of ``define_metric`` → its step metric.
        summary: the run's summary.
        artifacts: name of an artifact → the paths in it and where their contents lie.
        alerts: title and text of each.
        resumes: whether the run asks to go on where one with its id ended.
        directory: the run's folder.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Path]] = field(default_factory=dict)
    alerts: list[tuple[str, str]] = field(default_factory=list)
    resumes: bool = False
    directory: Path = Path()

    def column(self, key: str) -> list[tuple[int, Any]]:
        """(trainer/global_step, value) of every row that has the key."""
        return [(row["trainer/global_step"], row[key]) for row in self.history if key in row]


def read_wandb_run(folder: str | Path) -> WandbRun:
    """The one offline run below ``folder``, the logger's ``save_dir``. Call ``wandb.finish()`` first.

    ``finish`` may return before its service has written the file: this waits for the record of the exit.
    """
    runs = read_wandb_runs(folder)
    if len(runs) != 1:
        raise ValueError(f"expected one .wandb file below {folder}, got {len(runs)}")
    return runs[0]


def read_wandb_runs(folder: str | Path) -> list[WandbRun]:
    """The offline runs below ``folder``, oldest first; as :func:`read_wandb_run`."""
    deadline = time.monotonic() + _TIMEOUT
    while not (paths := sorted({path.resolve() for path in Path(folder).rglob("*.wandb")})):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return [_read(path) for path in paths]


def _read(path: Path) -> WandbRun:
    run = WandbRun(directory=path.parent)
    for kind, record in _finished(path):
        if kind == "history":
            row: dict[str, Any] = {}
            _update(row, record.history.item)
            run.history.append(row)
        elif kind == "run":
            _update(run.config, record.run.config.update)
            run.resumes = bool(record.run.resume)
        elif kind == "summary":
            _update(run.summary, record.summary.update)
        elif kind == "alert":
            run.alerts.append((record.alert.title, record.alert.text))
        elif kind == "artifact":
            entries = {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
            run.artifacts[record.artifact.name] = entries
        elif kind == "config":
            _update(run.config, record.config.update)
        elif kind == "metric":
            run.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    files = run.directory / "files"
    run.files = sorted(str(path.relative_to(files)) for path in files.rglob("*") if path.is_file())
    return run


def _finished(path: Path, timeout: float = _TIMEOUT) -> list[tuple[str, Any]]:
    """Kind and message of every record, once the run's exit is among them."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + timeout
    while True:
        records = [Record.FromString(data) for data in _records(path.read_bytes())]
        kinds = [record.WhichOneof("record_type") for record in records]
        if "exit" in kinds:
            return list(zip(kinds, records, strict=True))
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected an exit record in {path} within {timeout} s, got {kinds}")
        time.sleep(0.05)


def _records(data: bytes) -> Iterator[bytes]:
    """The whole records that are in the file so far."""
    if data and data[:4] != b":W&B":
        raise ValueError(f"expected a file that begins with :W&B, got {data[:4]!r}")
    position, parts = _HEADER, b""
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if position + 7 + length > len(data):
            return
        payload = data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind == _FULL:
            yield payload
        elif kind == _FIRST:
            parts = payload
        elif kind in (_MIDDLE, _LAST):
            parts += payload
            if kind == _LAST:
                yield parts
        else:
            raise ValueError(f"expected a record type from 1 to 4, got {kind} at byte {position}")


def _update(into: dict[str, Any], items: Any) -> None:
    for item in items:
        target = into
        *parents, last = [item.key] if item.key else list(item.nested_key)
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = json.loads(item.value_json)
