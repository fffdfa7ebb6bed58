"""What thinning takes out of a history, kept on disk until the table of every head is written."""

import tempfile
from array import array
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

_MAX_FAILURES = 3
"""After so many points in a row that could not be written no more are tried."""


class Forgotten:
    """Points that a :class:`~lightning_qk.record.history.History` removed to bound its memory.

    They lie in a file without a name, which is gone with the process; nothing is opened until a first point comes.
    Where the file cannot be written, points are lost and nothing else: those that were written stay.

    Attributes:
        problem: why points were lost, a sentence; None where none was.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        # Of each point its step, the number of its kind and its offset: 20 bytes.
        self._steps, self._kinds, self._offsets = array("q"), array("i"), array("q")
        self._names: list[tuple[str, ...]] = []
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
        names = tuple(values)
        if names not in self._names:
            self._names.append(names)
        self._steps.append(step)
        self._kinds.append(self._names.index(names))
        self._offsets.append(self._end)
        self._end += len(data)

    def cut(self, step: int) -> None:
        """Remove points at or after a step: the run was set back."""
        kept = [index for index, own in enumerate(self._steps) if own < step]
        for name in ("_steps", "_kinds", "_offsets"):
            column = getattr(self, name)
            setattr(self, name, array(column.typecode, (column[index] for index in kept)))

    def __len__(self) -> int:
        """Number of points."""
        return len(self._steps)

    def places(self, statistic: str, heads: int) -> "tuple[np.ndarray, np.ndarray]":
        """Steps of the removed points of a statistic in order, and the offsets of its values for :meth:`read`."""
        import numpy as np

        rank = [names.index(statistic) if statistic in names else -1 for names in self._names]
        own = (
            np.asarray(rank, dtype=np.int64)[np.asarray(self._kinds)] if len(self) else np.empty(0, np.int64)
        )
        steps, offsets = np.asarray(self._steps, np.int64), np.asarray(self._offsets, np.int64)
        order = np.argsort(steps, kind="stable")
        order = order[own[order] >= 0]
        return steps[order], (offsets + 4 * heads * own)[order]

    def read(self, place: int, heads: int) -> "np.ndarray | None":
        """Values of a statistic at a place, ``(heads,)``; None where they were not written to the end."""
        import numpy as np

        assert self._file is not None  # there is a place
        self._file.seek(place)
        data = self._file.read(4 * heads)
        return np.frombuffer(data, dtype=np.float32) if len(data) == 4 * heads else None
