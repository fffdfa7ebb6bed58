"""What thinning takes out of a history, kept on disk until the table of every head is written."""

import tempfile
from collections.abc import Mapping
from typing import IO, Any

import torch
from torch import Tensor

_MAX_FAILURES = 3
"""After so many points in a row that could not be written no more are tried."""


class Forgotten:
    """Points that a :class:`~lightning_qk.record.history.History` let go to bound its memory.

    They lie in a file without a name, which is gone with the process; nothing is opened until a first point comes.
    Where the file cannot be written, points are lost and nothing else: those that were written stay.

    Attributes:
        problem: why points were lost, a sentence; None where none was.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._points: list[tuple[int, tuple[str, ...], int]] = []
        self._end = 0
        self._failed = 0
        self.problem: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Empty: another process cannot have the file."""
        return vars(Forgotten())

    def keep(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Write a point.

        Args:
            step: its step.
            values: statistic → float32 values of all heads, ``(heads,)``.

        A full disk ends the keeping, with one warning: what was kept before stays.
        """
        if self._failed >= _MAX_FAILURES:
            return
        try:
            self._write(step, values)
        except OSError as error:
            self._failed += 1
            self.problem = (
                "points that are thinned out of the history could not be kept for the table of every head "
                f"({error}): set TMPDIR to a folder with space"
            )
        else:
            self._failed = 0

    def _write(self, step: int, values: Mapping[str, Tensor]) -> None:
        if self._file is None:
            # Without a buffer: what a full disk refuses must not be written with a later point.
            self._file = tempfile.TemporaryFile(prefix="lightning_qk_", buffering=0)  # noqa: SIM115 (open while the run goes on)
        data = torch.stack([value.to("cpu", torch.float32) for value in values.values()]).numpy().tobytes()
        self._file.seek(self._end)
        if self._file.write(data) != len(data):
            raise OSError("no space left on the device")
        self._points.append((step, tuple(values), self._end))
        self._end += len(data)

    def cut(self, step: int) -> None:
        """Let go what came at a step or after it: the run was set back."""
        self._points = [point for point in self._points if point[0] < step]

    def series(self, statistic: str, heads: int) -> tuple[list[int], Tensor]:
        """The steps at which a statistic was let go, in their order, and its values, ``(points, heads)``."""
        steps, rows = [], []
        for step, names, offset in sorted(self._points):
            if statistic in names:
                assert self._file is not None  # there is a point
                self._file.seek(offset + names.index(statistic) * heads * 4)
                data = self._file.read(heads * 4)
                if len(data) == heads * 4:
                    rows.append(torch.frombuffer(bytearray(data), dtype=torch.float32))
                    steps.append(step)
        return steps, torch.stack(rows) if rows else torch.empty(0, heads)
