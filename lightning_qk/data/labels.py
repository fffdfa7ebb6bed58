"""Labels of classes: their names, their numbers, and splits that keep their shares."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def label_names(rows: "Dataset", column: str, where: str) -> list[str]:
    """Names of the classes in the order of their numbers.

    Args:
        rows: rows to train on.
        column: column with the labels.
        where: what the rows were read from, for messages.

    Returns:
        The names that the data set itself has; else the labels that occur, sorted: strings by letter,
        integers by value.

    Raises:
        ValueError: labels that are neither strings nor integers, or fewer than two classes.
    """
    feature = rows.features[column]
    declared = getattr(feature, "names", None)
    if declared:
        return [str(name) for name in declared]
    values = set(rows.unique(column))
    if None in values:
        raise ValueError(
            f"expected a label in every row of {where}, got rows with none in the column {column!r}: fill "
            "them or take the rows out"
        )
    kinds = {type(value) for value in values}
    if not (kinds <= {int, bool} or kinds == {str}):
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no labels at all"
        raise ValueError(
            f"expected strings or integers as labels in the column {column!r} of {where}, got {found}: "
            "convert them, or pass label_column="
        )
    if len(values) < 2:
        raise ValueError(
            f"expected at least two classes in the column {column!r} of {where}, got "
            f"{', '.join(map(repr, sorted(values)))}: add rows, or pass label_column="
        )
    return [str(value) for value in sorted(values)]


def encode_labels(
    rows: "dict[str, Dataset]",
    column: str,
    names: Sequence[str],
    text_column: str,
    where: Callable[[str], str],
) -> "dict[str, Dataset]":
    """Put class numbers in place of labels; other columns than text and label are dropped.

    A test split whose labels are all -1, as the hub's benchmarks have it, is left out.

    Args:
        rows: split → rows.
        column: column with the labels.
        names: classes as :func:`label_names` returns them.
        text_column: column with the text.
        where: gives what a split was read from, for messages.

    Raises:
        ValueError: a label that is none of the classes, or a row without text.
    """
    from datasets import Dataset

    encoded: dict[str, Dataset] = {}
    for split, part in rows.items():
        declared = getattr(part.features[column], "names", None)
        numbers: dict[Any, int] = {name: index for index, name in enumerate(names)}
        labels = part[column][:]
        if split == "test" and set(labels) == {-1}:
            continue
        texts = part[text_column][:]
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(
                    f"expected text in the column {text_column!r} of {where(split)}, got {text!r} in row "
                    f"{index}: mend the row, or pass text_column="
                )
        keys = labels if declared else [str(label) for label in labels]
        unknown = sorted({str(key) for key in keys if not declared and key not in numbers})
        if unknown:
            raise ValueError(
                f"expected one of the training labels {', '.join(map(repr, names))} in {where(split)}, got "
                f"{', '.join(map(repr, unknown))}: add such rows to the training data or take these out"
            )
        encoded[split] = Dataset.from_dict(
            {text_column: texts, column: keys if declared else [numbers[key] for key in keys]}
        )
    return encoded


def stratified_split(labels: Sequence[Any], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers that stay and row numbers that are taken, the same share of every class.

    Args:
        labels: one a row.
        fraction: share to take, between 0 and 1.
        seed: of the choice.

    Returns:
        Both lists in ascending order. A class with a single row stays.
    """
    classes: defaultdict[Any, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        classes[label].append(index)
    generator = random.Random(seed)
    taken: list[int] = []
    for members in classes.values():
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        taken += generator.sample(members, count)
    chosen = set(taken)
    return [index for index in range(len(labels)) if index not in chosen], sorted(chosen)
