"""Documents of token numbers to blocks of one length."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasets import Dataset


def pack(tokens: NDArray[np.int32], block_size: int) -> NDArray[np.int32]:
    """Cut a stream of tokens into blocks. Only the tail that fills no block is dropped.

    Args:
        tokens: shape ``(tokens,)``, all documents one after the other.
        block_size: tokens a block, at least 1.

    Returns:
        Shape ``(tokens // block_size, block_size)``.
    """
    blocks = len(tokens) // block_size
    return tokens[: blocks * block_size].reshape(blocks, block_size)


def token_stream(tokenized: "Dataset", column: str = "input_ids") -> NDArray[np.int32]:
    """All documents of a tokenized data set one after the other, shape ``(tokens,)``.

    Args:
        tokenized: rows with a list of token numbers each.
        column: where they are.
    """
    chunks = tokenized.with_format("arrow")[:][column].chunks if len(tokenized) else []
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False) for chunk in chunks]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def block_dataset(blocks: NDArray[np.int32]) -> "Dataset":
    """Blocks as a data set with the column ``input_ids``.

    Args:
        blocks: shape ``(blocks, block_size)``.
    """
    import pyarrow as pa
    from datasets import Dataset

    values: Any = pa.FixedSizeListArray.from_arrays(pa.array(blocks.reshape(-1)), blocks.shape[1])
    return Dataset(pa.table({"input_ids": values}))
