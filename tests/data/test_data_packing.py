"""Packing loses no token but the tail."""

import numpy as np
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from lightning_qk.data.collate import block_dataset, pack, token_stream

documents = st.lists(st.lists(st.integers(0, 1000), max_size=20), max_size=20)


@given(documents, st.integers(1, 16))
def test_blocks_are_the_documents_up_to_the_tail(docs: list[list[int]], block_size: int) -> None:
    joined = [token for document in docs for token in document]

    blocks = pack(np.array(joined, dtype=np.int32), block_size)

    assert blocks.shape == (len(joined) // block_size, block_size)
    assert blocks.reshape(-1).tolist() == joined[: len(joined) - len(joined) % block_size]


def test_stream_joins_the_chunks_of_a_table_in_order() -> None:
    docs = [[1, 2, 3], [], [4], [5, 6]]
    rows = Dataset.from_dict({"input_ids": docs[:2]})
    from datasets import concatenate_datasets

    rows = concatenate_datasets([rows, Dataset.from_dict({"input_ids": docs[2:]}, features=rows.features)])
    assert rows.data.column("input_ids").num_chunks == 2

    assert token_stream(rows).tolist() == [1, 2, 3, 4, 5, 6]


def test_stream_follows_a_selection_of_rows() -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4], [5, 6]]}).select([2, 0])

    assert token_stream(rows).tolist() == [5, 6, 1, 2, 3]


def test_stream_of_nothing_is_empty() -> None:
    assert token_stream(Dataset.from_dict({"input_ids": []})).tolist() == []


def test_block_dataset_keeps_the_blocks() -> None:
    blocks = np.arange(12, dtype=np.int32).reshape(3, 4)

    rows = block_dataset(blocks)

    assert rows["input_ids"][:] == blocks.tolist()
