"""Batches for the three tasks."""

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class BlockCollator:
    """Blocks of one length to a batch for causal language modelling, where the labels are the tokens."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Stack rows to ``input_ids`` and ``labels``, each ``(batch, block_size)``."""
        tokens = torch.tensor([row["input_ids"] for row in rows], dtype=torch.long)
        return {"input_ids": tokens, "labels": tokens.clone()}


class MaskingCollator:
    """Blocks of one length to a batch for masked language modelling.

    Of the chosen tokens 80 % become the mask token, 10 % a random token, and 10 % stay (Devlin et al. 2019).
    Special tokens are never chosen. Each block gets at least one, so that the loss is never empty.

    Args:
        tokenizer: has to have a mask token.
        probability: chance of a token to be chosen.
        seed: None draws from PyTorch's global generator, for training. With a number the choice depends on
            that number and on the block alone, so that every evaluation sees the same masks.

    Raises:
        ValueError: no mask token, or a probability outside of (0, 1].
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", probability: float = 0.15, seed: int | None = None
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError(
                "expected a tokenizer with a mask token for the task masked_lm, got "
                f"{tokenizer.name_or_path!r} without one: pick another tokenizer, or the task causal_lm"
            )
        if not 0 < probability <= 1:
            raise ValueError(f"expected a mask_probability in (0, 1], got {probability}: correct it")
        self.probability = probability
        self.seed = seed
        self.mask_token = int(tokenizer.mask_token_id)
        self.special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.long)
        ordinary = torch.ones(len(tokenizer), dtype=torch.bool)
        ordinary[self.special] = False
        self.ordinary = ordinary.nonzero().squeeze(-1)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Mask rows to ``input_ids`` and ``labels``, each ``(batch, block_size)``; other labels are -100."""
        masked = [self._mask(torch.tensor(row["input_ids"], dtype=torch.long)) for row in rows]
        tokens, labels = zip(*masked, strict=True)
        return {"input_ids": torch.stack(tokens), "labels": torch.stack(labels)}

    def _mask(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        generator = None
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + zlib.crc32(tokens.numpy().tobytes()))
        allowed = ~torch.isin(tokens, self.special)
        draw = torch.rand(tokens.shape, generator=generator).masked_fill(~allowed, 2.0)
        chosen = draw < self.probability
        if allowed.any() and not chosen.any():
            chosen[draw.argmin()] = True
        action = torch.rand(tokens.shape, generator=generator)
        choice = torch.randint(len(self.ordinary), tokens.shape, generator=generator)
        labels = tokens.masked_fill(~chosen, -100)
        tokens = torch.where(chosen & (action < 0.8), self.mask_token, tokens)
        tokens = torch.where(chosen & (action >= 0.9), self.ordinary[choice], tokens)
        return tokens, labels


class PaddingCollator:
    """Tokenized texts of different lengths to a batch for classification, padded to the longest.

    Args:
        tokenizer: has to have a pad token.

    Raises:
        ValueError: no pad token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "expected a tokenizer with a pad token for the task sequence_classification, got "
                f"{tokenizer.name_or_path!r} without one: set tokenizer.pad_token and save it again"
            )
        from transformers import DataCollatorWithPadding

        self._pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad rows to ``input_ids`` and ``attention_mask`` ``(batch, length)``; ``labels`` ``(batch,)``."""
        return dict(self._pad(rows))


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


def token_stream(tokenized: "Dataset") -> NDArray[np.int32]:
    """The ``input_ids`` of all rows of a tokenized data set one after the other, shape ``(tokens,)``."""
    chunks = tokenized.with_format("arrow")[:]["input_ids"].chunks if len(tokenized) else []
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
