"""Many numbers as a little text: how the report carries its data."""

import base64
import gzip
import json
from typing import Any

import numpy as np
from torch import Tensor

# Of float32's 24 bits of mantissa 12 are kept: numbers are right to 2.4e-4 of themselves; NaN and infinity stay.
_KEPT = np.uint32(0xFFFFF000)
_HALF = np.uint32(0x00000800)


class Pack:
    """Arrays of float32, one after the other, rounded and compressed.

    Equal bytes of all numbers stand together (all first bytes, then all second ones): signs and exponents of a
    statistic are nearly the same and compress to nothing, while mantissas hardly compress at all.
    """

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._size = 0

    def add(self, values: Tensor) -> list[int]:
        """Append an array.

        Returns:
            Where it starts, and its length: how the page finds it.
        """
        flat = values.detach().float().reshape(-1).numpy()
        start, self._size = self._size, self._size + len(flat)
        self._parts.append(flat)
        return [start, len(flat)]

    def text(self, content: dict[str, Any]) -> str:
        """Arrays and what says where they are, as gzip in base64.

        Compressed is: four bytes with the length of the JSON, little endian; the JSON; then the first, second and
        third bytes of all numbers.
        """
        head = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
        plain = len(head).to_bytes(4, "little") + head + self._planes()
        # No time stamp: the same record makes the same page.
        return base64.b64encode(gzip.compress(plain, 6, mtime=0)).decode("ascii")

    def _planes(self) -> bytes:
        flat = np.concatenate(self._parts) if self._parts else np.empty(0, np.float32)
        bits = flat.astype(np.float32).view(np.uint32)
        # Carrying into the exponent is what rounding up to the next power of two is. NaN must stay NaN.
        rounded = np.where(np.isfinite(flat), bits + _HALF, bits) & _KEPT
        rounded = np.where(np.isnan(flat), np.uint32(0x7FC00000), rounded)
        return b"".join(((rounded >> shift) & 0xFF).astype(np.uint8).tobytes() for shift in (24, 16, 8))
