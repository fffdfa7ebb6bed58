"""The numbers of a report's page, as its script takes them apart."""

import base64
import gzip
import json
from typing import Any

import numpy as np


def unpack(text: str) -> tuple[dict[str, Any], np.ndarray]:
    """What `Pack.text` was given: the content, and all numbers as one array. The page does the same."""
    plain = gzip.decompress(base64.b64decode(text))
    length = int.from_bytes(plain[:4], "little")
    planes = np.frombuffer(plain[4 + length :], np.uint8).reshape(3, -1).astype(np.uint32)
    bits = (planes[0] << 24) | (planes[1] << 16) | (planes[2] << 8)
    return json.loads(plain[4 : 4 + length]), bits.astype(np.uint32).view(np.float32)
