"""The ready-made data module: text, tokens, batches."""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.data.stdlib import stdlib_snippets, stdlib_texts
    from lightning_qk.data.text import TextDataModule
    from lightning_qk.data.tokenizers import byte_tokenizer

__all__ = ["TextDataModule", "byte_tokenizer", "stdlib_snippets", "stdlib_texts"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "stdlib": ["stdlib_snippets", "stdlib_texts"],
        "text": ["TextDataModule"],
        "tokenizers": ["byte_tokenizer"],
    },
)
