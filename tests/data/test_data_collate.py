"""Batches for the three tasks."""

import pytest
import torch

from lightning_qk.data.collate import BlockCollator, MaskingCollator, PaddingCollator
from lightning_qk.data.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
ROWS = [{"input_ids": torch.randint(0, 256, (400,)).tolist()} for _ in range(50)]


def test_labels_of_a_causal_model_are_the_tokens() -> None:
    batch = BlockCollator()([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])

    assert batch["input_ids"].tolist() == [[1, 2], [3, 4]]
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()


def test_masks_follow_the_recipe() -> None:
    tokens = torch.tensor([row["input_ids"] for row in ROWS])

    batch = MaskingCollator(TOKENIZER)(ROWS)

    chosen = batch["labels"] != -100
    assert torch.equal(batch["labels"][chosen], tokens[chosen])
    assert torch.equal(batch["input_ids"][~chosen], tokens[~chosen])
    count = chosen.sum().item()  # 20,000 tokens: the bounds are four standard deviations
    assert count / chosen.numel() == pytest.approx(0.15, abs=0.0101)
    masked = (batch["input_ids"][chosen] == TOKENIZER.mask_token_id).sum().item() / count
    same = (batch["input_ids"][chosen] == tokens[chosen]).sum().item() / count
    assert masked == pytest.approx(0.8, abs=0.03)
    assert same == pytest.approx(0.1 + 0.1 / 256, abs=0.022)
    replaced = batch["input_ids"][chosen & (batch["input_ids"] != tokens)]
    assert set(replaced.tolist()) <= {*range(256), TOKENIZER.mask_token_id}


def test_special_tokens_are_never_masked() -> None:
    special = [TOKENIZER.cls_token_id, TOKENIZER.eos_token_id, TOKENIZER.sep_token_id]

    batch = MaskingCollator(TOKENIZER, 1.0)([{"input_ids": [special[0], 65, 66, *special[1:]]}])

    assert batch["labels"].tolist() == [[-100, 65, 66, -100, -100]]


def test_every_block_has_something_to_predict() -> None:
    collate = MaskingCollator(TOKENIZER, 0.001)

    labels = collate([{"input_ids": [TOKENIZER.eos_token_id, 65, 66]}] * 100)["labels"]

    assert ((labels != -100).sum(dim=1) == 1).all()


def test_masks_of_an_evaluation_depend_on_the_block_alone() -> None:
    torch.manual_seed(1)
    alone = [MaskingCollator(TOKENIZER, seed=3)([row]) for row in ROWS[:4]]
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    together = MaskingCollator(TOKENIZER, seed=3)(ROWS[:4])

    assert torch.equal(torch.cat([batch["input_ids"] for batch in alone]), together["input_ids"])
    assert torch.equal(torch.random.get_rng_state(), state)
    other = MaskingCollator(TOKENIZER, seed=4)(ROWS[:4])
    assert not torch.equal(other["input_ids"], together["input_ids"])


def test_texts_are_padded_to_the_longest_of_the_batch() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": 1},
        {"input_ids": [4], "attention_mask": [1], "labels": 0},
    ]

    batch = PaddingCollator(TOKENIZER)(rows)

    pad = TOKENIZER.pad_token_id
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_tokenizers_that_lack_a_token_are_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.mask_token = None
    tokenizer.pad_token = None

    with pytest.raises(ValueError, match="expected a tokenizer with a mask token"):
        MaskingCollator(tokenizer)
    with pytest.raises(ValueError, match="expected a tokenizer with a pad token"):
        PaddingCollator(tokenizer)
    with pytest.raises(ValueError, match=r"expected a mask_probability in \(0, 1\], got 1.5"):
        MaskingCollator(TOKENIZER, 1.5)
