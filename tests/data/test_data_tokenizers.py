"""Tokenizers that are made here."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lightning_qk.data.tokenizers import byte_tokenizer, end_token, load_tokenizer, word_tokenizer

BYTES = byte_tokenizer()
SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>", "<cls>", "<sep>", "<mask>")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_are_the_utf8_bytes_and_decode_to_the_same_text(text: str) -> None:
    ids = BYTES(text, add_special_tokens=False)["input_ids"]

    assert ids == list(text.encode("utf-8"))
    assert BYTES.decode(ids) == text


def test_names_of_special_tokens_in_a_text_are_text() -> None:
    text = "a " + " ".join(SPECIALS) + " b ,  . 's"

    ids = BYTES(text, add_special_tokens=False)["input_ids"]

    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


def test_bytes_have_all_special_tokens_apart_from_the_bytes() -> None:
    assert len(BYTES) == 256 + len(SPECIALS)
    assert sorted(BYTES.all_special_ids) == list(range(256, 263))
    assert BYTES("hi")["input_ids"] == [BYTES.cls_token_id, *b"hi", BYTES.sep_token_id]


def test_bytes_survive_save_pretrained(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path)

    loaded = AutoTokenizer.from_pretrained(tmp_path)

    text = "naïve <eos>\n\ttext  ."
    assert loaded(text)["input_ids"] == BYTES(text)["input_ids"]
    assert loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) == text
    assert loaded.all_special_ids == BYTES.all_special_ids


def test_words_are_the_most_frequent_ones() -> None:
    tokenizer = word_tokenizer(["b a a c", "a b <unk> d"], vocab_size=len(SPECIALS) + 3)

    assert len(tokenizer) == len(SPECIALS) + 3
    # a three times, b twice; c and d tie, and c is the first by letter.
    assert set(tokenizer.get_vocab()) == {*SPECIALS, "a", "b", "c"}
    ids = tokenizer("a d <unk>", add_special_tokens=False)["input_ids"]
    assert ids == [tokenizer.convert_tokens_to_ids("a"), tokenizer.unk_token_id, tokenizer.unk_token_id]


def test_words_survive_save_pretrained(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(["the cat sat on the mat"], vocab_size=20)
    tokenizer.save_pretrained(tmp_path)

    loaded = AutoTokenizer.from_pretrained(tmp_path)

    assert loaded("the cat flew")["input_ids"] == tokenizer("the cat flew")["input_ids"]


def test_vocabulary_without_room_for_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a vocab_size above 7.* got 7: raise it"):
        word_tokenizer(["a"], vocab_size=7)


def test_a_folder_is_loaded_and_a_wrong_name_told(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path / "mine")
    assert len(load_tokenizer(str(tmp_path / "mine"))) == len(BYTES)

    with pytest.raises(ValueError, match=r"expected a folder or a name .* as tokenizer, got '.*/none'"):
        load_tokenizer(str(tmp_path / "none"))


def test_a_tokenizer_without_pad_token_pads_with_eos(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)

    assert load_tokenizer(str(tmp_path)).pad_token == "<eos>"


def test_end_token_is_eos_else_sep_else_an_error() -> None:
    tokenizer = byte_tokenizer()
    assert end_token(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert end_token(tokenizer) == tokenizer.sep_token_id
    tokenizer.sep_token = None
    with pytest.raises(ValueError, match="expected a tokenizer with an eos or a sep token"):
        end_token(tokenizer)
