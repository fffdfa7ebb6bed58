"""Labels of classes and splits that keep their shares."""

from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from lightning_qk.data.sources import encode_labels, label_names, stratified_split


def rows(*labels: object) -> Dataset:
    return Dataset.from_dict({"text": ["t"] * len(labels), "label": list(labels)})


def test_names_are_sorted_strings_or_numbers_or_what_the_data_declare() -> None:
    assert label_names(rows("pos", "neg", "pos"), "label", "x") == ["neg", "pos"]
    assert label_names(rows(10, 9, 10), "label", "x") == ["9", "10"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zero", "a"])})
    declared = Dataset.from_dict({"text": ["t"], "label": [1]}, features=features)
    assert label_names(declared, "label", "x") == ["zero", "a"]
    assert encode_labels({"train": declared}, "label", ["zero", "a"], "text", str)["train"]["label"][:] == [1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((0.5, 1.5), "expected strings or integers as labels .* got float"),
        (("a", None), "expected a label in every row"),
        (("a", "a"), "expected at least two classes .* got 'a'"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_names(rows(*labels), "label", "file.csv")


def test_labels_become_numbers_in_every_split() -> None:
    encoded = encode_labels({"train": rows("b", "a"), "val": rows("b")}, "label", ["a", "b"], "text", str)

    assert encoded["train"]["label"][:] == [1, 0]
    assert encoded["val"]["label"][:] == [1]


def test_a_label_that_training_does_not_know_is_told() -> None:
    with pytest.raises(ValueError, match="expected one of the training labels 'a', 'b' in val, got 'c'"):
        encode_labels({"train": rows("b", "a"), "val": rows("c")}, "label", ["a", "b"], "text", str)


def test_a_test_split_without_labels_is_left_out() -> None:
    assert list(
        encode_labels({"train": rows(0, 1), "test": rows(-1, -1)}, "label", ["0", "1"], "text", str)
    ) == ["train"]


def test_a_row_without_text_is_told() -> None:
    bad = Dataset.from_dict({"text": ["t", None], "label": [0, 1]})
    with pytest.raises(ValueError, match="expected text in the column 'text' of train, got None in row 2"):
        encode_labels({"train": bad}, "label", ["0", "1"], "text", str)


@given(st.lists(st.sampled_from("abc"), max_size=60), st.floats(0.05, 0.6), st.integers(0, 5))
def test_split_is_a_partition_that_keeps_shares(labels: list[str], fraction: float, seed: int) -> None:
    stay, taken = stratified_split(labels, fraction, seed)

    assert sorted(stay + taken) == list(range(len(labels)))
    assert (stay, taken) == stratified_split(labels, fraction, seed)
    counts, got = Counter(labels), Counter(labels[index] for index in taken)
    for label, count in counts.items():
        assert abs(got[label] - fraction * count) <= 1
        assert got[label] < count
