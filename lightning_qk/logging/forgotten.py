"""What thinning takes out of a history, kept on disk until the table of every head is written."""

import tempfile
from collections.abc import Mapping
from typing import IO, Any

import torch
from torch import Tensor


class Forgotten:
    """Points that a :class:`~lightning_qk.logging.history.History` let go to bound its memory.

    They lie in a file without a name, which is gone with the process; nothing is opened until a first point comes.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._points: list[tuple[int, tuple[str, ...], int]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Empty: another process cannot have the file."""
        return {"_file": None, "_points": []}

    def keep(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Write a point.

        Args:
            step: its step.
            values: statistic → float32 values of all heads, ``(heads,)``.
        """
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="lightning_qk_")  # noqa: SIM115 (open while the run goes on)
        table = torch.stack([value.to("cpu", torch.float32) for value in values.values()])
        offset = self._file.seek(0, 2)
        self._file.write(table.numpy().tobytes())
        self._points.append((step, tuple(values), offset))

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
                rows.append(torch.frombuffer(bytearray(self._file.read(heads * 4)), dtype=torch.float32))
                steps.append(step)
        return steps, torch.stack(rows) if rows else torch.empty(0, heads)
