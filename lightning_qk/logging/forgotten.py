"""What thinning takes out of a history, kept on disk until the table of every head is written."""

import tempfile
import warnings
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
        # Whether the disk took no more: later points are let go, and a reader is told once.
        self.is_full = False

    def __getstate__(self) -> dict[str, Any]:
        """Empty: another process cannot have the file."""
        return {"_file": None, "_points": [], "is_full": False}

    def keep(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Write a point.

        Args:
            step: its step.
            values: statistic → float32 values of all heads, ``(heads,)``.

        A full disk ends the keeping, with one warning: what was kept before stays.
        """
        if self.is_full:
            return
        table = torch.stack([value.to("cpu", torch.float32) for value in values.values()])
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="lightning_qk_", buffering=0)  # noqa: SIM115 (open while the run goes on)
            offset = self._file.seek(0, 2)
            data = memoryview(table.numpy().tobytes())
            while data:
                written = self._file.write(data)
                if not written:
                    raise OSError("nothing was written")
                data = data[written:]
        except OSError as error:
            self.is_full = True
            warnings.warn(
                f"steps that thinning takes out of the history are not kept from step {step} on, since "
                f"the folder for "
                f"temporary files takes no more ({error.strerror or error}): set TMPDIR to one with room",
                stacklevel=2,
            )
            return
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
