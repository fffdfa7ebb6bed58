"""Tokenizers: two that are made here, any from a folder or the hub; and data sets as their tokens."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_qk._printable import one_line
from lightning_qk.data.collate import block_dataset, pack, token_stream

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_SPECIAL = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "cls_token": "<cls>",
    "sep_token": "<sep>",
    "mask_token": "<mask>",
}


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer that needs no file: one token a byte of UTF-8, and the special tokens.

    Tokens 0 to 255 are the bytes. Decoding gives back the text exactly, whatever is in it; a text that
    contains the name of a special token is bytes like any other.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    # Byte-level BPE writes each byte as a printable character.
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _wrap(backend)


def word_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A word-level tokenizer: the most frequent words between white space, the rest is ``<unk>``.

    Args:
        texts: what to count the words in.
        vocab_size: size of the vocabulary, the seven special tokens included.

    Raises:
        ValueError: the vocabulary has no room for a word.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    if vocab_size <= len(_SPECIAL):
        raise ValueError(
            f"expected a vocab_size above {len(_SPECIAL)}, the number of special tokens, got {vocab_size}: "
            "raise it"
        )
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.split())
    for token in _SPECIAL.values():
        counts.pop(token, None)
    # Ties are broken by the word, so that the vocabulary does not depend on the order of the texts.
    words = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - len(_SPECIAL)]
    vocab = {word: index for index, word in enumerate([*_SPECIAL.values(), *words])}
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token=_SPECIAL["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(backend)


def _wrap(backend: object) -> "PreTrainedTokenizerFast":
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **_SPECIAL,
        # The name of a special token in a text is text.
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    cls, sep = _SPECIAL["cls_token"], _SPECIAL["sep_token"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, tokenizer.cls_token_id), (sep, tokenizer.sep_token_id)],
    )
    return tokenizer


def load_tokenizer(name: str, role: str = "tokenizer") -> "PreTrainedTokenizerBase":
    """Load a tokenizer.

    Args:
        name: ``"bytes"``, a folder, a GGUF file, or a name on the Hugging Face hub.
        role: what the user gave the name for, for the message.

    Raises:
        ValueError: there is no tokenizer of that name.
    """
    if name == "bytes":
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        folder, file = os.path.split(name)
        if file.endswith(".gguf") and os.path.isfile(name):
            tokenizer = AutoTokenizer.from_pretrained(folder or ".", gguf_file=file)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # missing files, network, broken JSON: all end in this one line
        raise ValueError(
            f"expected a folder or a name on the Hugging Face hub as {role}, got {name!r} "
            f"({one_line(error)}): correct it, check the network, or take the tokenizer 'bytes' or 'words'"
        ) from error
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # GPT-2 and others have none
    return tokenizer


def end_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that ends a document: ``eos``, else ``sep``.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        "expected a tokenizer with an eos or a sep token to put between documents, got "
        f"{tokenizer.name_or_path!r} with neither: set tokenizer.eos_token and save it again"
    )


def tokenize_texts(
    rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", columns: list[str], max_length: int, cache: Path
) -> "Dataset":
    """Each text for itself, with its label.

    Args:
        rows: with a text and a label each.
        tokenizer: the tokenizer.
        columns: those of the text and of the label.
        max_length: tokens that are kept of a text.
        cache: file for the result.
    """

    def encode(texts: list[str], labels: list[int]) -> dict[str, Any]:
        encoded = tokenizer(texts, truncation=True, max_length=max_length)
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": labels,
        }

    return _map(rows, encode, columns, cache)


def tokenize_blocks(
    rows: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    column: str,
    block_size: int,
    cache: Path,
    *,
    around: bool,
    where: str,
) -> "Dataset":
    """Documents one after the other, each ended by a token, cut into blocks.

    Args:
        rows: the documents; those of white space are left out.
        tokenizer: the tokenizer.
        column: of the text.
        block_size: tokens a block.
        cache: file for the tokens.
        around: special tokens stand around each document even where the tokenizer has no bos token.
        where: what the blocks are for and where they come from, for the message.

    Raises:
        ValueError: there are too few tokens for a block, or the tokenizer has no token to end a document.
    """
    end = end_token(tokenizer)
    # What the model saw around each text when it was trained: [CLS] … [SEP], or a bos token, or nothing.
    around = around or tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]

    def encode(texts: list[str]) -> dict[str, Any]:
        filled = [text for text in texts if text and text.strip()]
        documents = tokenizer(filled, add_special_tokens=around, verbose=False)["input_ids"] if filled else []
        return {"input_ids": [ids if ids[-1:] == [end] else [*ids, end] for ids in documents]}

    stream = token_stream(_map(rows, encode, [column], cache))
    blocks = pack(stream, block_size)
    if not len(blocks):
        raise ValueError(
            f"expected at least one block of {block_size} tokens {where}, got {len(stream)} tokens: add text, or "
            "lower block_size"
        )
    return block_dataset(blocks)


def _map(rows: "Dataset", encode: Callable[..., Any], columns: list[str], cache: Path) -> "Dataset":
    if len(rows) > 10_000:
        from lightning.pytorch.utilities import rank_zero_info

        rank_zero_info(f"Tokenizing {len(rows)} rows ({cache.stem})")
    return rows.map(
        encode,
        batched=True,
        input_columns=columns,
        remove_columns=rows.column_names,
        cache_file_name=str(cache),
    )
