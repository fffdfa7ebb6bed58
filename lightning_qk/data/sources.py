"""Rows of text from files or a data set's name, with an error that says what is wrong with them."""

import codecs
import csv
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_qk._printable import one_line
from lightning_qk.data.checks import check_classes, check_fields, hint_of_header, rows_named

if TYPE_CHECKING:
    from datasets import Dataset

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    # Fields of a .tsv have no quoting: a lone quotation mark is text.
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}

SPLIT_NAMES = {"train": ("train",), "val": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""What data sets call their splits."""


def looks_like_file(source: str) -> bool:
    """Whether a source is meant as a file rather than as the name of a data set on the hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path.suffix.lower() in _READERS
    return (
        path.is_file()
        or path.is_absolute()
        or path.suffix.lower() in _READERS
        or source.startswith((".", "~"))
    )


def check_files(paths: Sequence[str]) -> list[Path]:
    """Make sure that files can be read at all, before anything is read.

    Args:
        paths: the files of one split.

    Returns:
        The files as absolute paths.

    Raises:
        ValueError: a file is missing or empty, or the files are of different or unknown kinds.
    """
    found = [Path(path).expanduser().resolve() for path in paths]
    if not found:
        raise ValueError("expected at least one file, got an empty list: name the files to read")
    for path in found:
        suffix = path.suffix.lower()
        if suffix not in _READERS:
            raise ValueError(
                f"expected a file that ends in {', '.join(_READERS)}, got {path.name!r} ({path}): convert it "
                "or rename it"
            )
        if not path.is_file():
            what = "a folder" if path.is_dir() else "no such file"
            raise ValueError(f"expected a text file, got {what}: {path}; correct the path")
        if path.stat().st_size == 0:
            raise ValueError(f"expected text in {path}, got an empty file: fill it or leave it out")
    suffixes = sorted({path.suffix.lower() for path in found})
    if len(suffixes) > 1:
        raise ValueError(
            f"expected files of one kind, got {' and '.join(suffixes)}: convert them to one of these"
        )
    return found


def _check_encoding(path: Path, encoding: str) -> None:
    """Decode a file once, so that an error of encoding names its place."""
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
    except LookupError as error:
        raise ValueError(
            f"expected the name of a text encoding such as utf-8 or latin-1, got {encoding!r}: correct "
            "encoding="
        ) from error
    before = pending = 0
    with path.open("rb") as file:
        while True:
            chunk = file.read(1 << 20)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeError as error:
                # The decoder counts from the bytes that it kept of the chunk before.
                position = before - pending + getattr(error, "start", 0)
                raise ValueError(
                    f"expected {encoding} text in {path}, got an invalid byte at position {position}: "
                    "save the file as UTF-8 again, or pass its encoding="
                ) from error
            if not chunk:
                return
            before += len(chunk)
            pending = len(decoder.getstate()[0])


def read_files(paths: Sequence[Path], cache_dir: Path, *, encoding: str = "utf-8") -> "Dataset":
    """Read the files of one split.

    A row is a line of a ``.txt`` file (column ``text``), a line of a ``.csv`` or ``.tsv`` file with a header,
    an object of a ``.json`` or ``.jsonl`` file, or a row of a ``.parquet`` file.

    Args:
        paths: files of one kind, as :func:`check_files` returns them.
        cache_dir: folder for the Arrow tables.
        encoding: of the text; Parquet and JSON are UTF-8 always.

    Raises:
        ValueError: the text is not in that encoding, or the files cannot be parsed.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    builder, options = _READERS[paths[0].suffix.lower()]
    if builder in ("text", "csv"):
        options = {**options, "encoding": encoding}
    for path in paths:
        if builder != "parquet":
            _check_encoding(path, "utf-8" if builder == "json" else encoding)
        if builder == "csv":
            check_fields(path, encoding=encoding)
    try:
        return load_dataset(
            builder, data_files={"train": [str(path) for path in paths]}, cache_dir=str(cache_dir), **options
        )["train"]
    except (DatasetGenerationError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):
            names = ", ".join(map(str, paths))
            raise ValueError(f"expected text in {names}, got no rows: fill it or leave it out") from error
        # The library wraps the parser's own complaint, which is the one that helps.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(
            f"expected {builder} rows with the same columns in {', '.join(map(str, paths))}, got a file that "
            f"cannot be parsed ({type(cause).__name__}: {one_line(cause)}): mend that file"
        ) from error


def read_dataset(name: str, config_name: str | None = None) -> "dict[str, Dataset]":
    """Load a data set by its name on the hub, or from a folder on this machine.

    Args:
        name: name on the hub (``"stanfordnlp/sst2"``) or a folder.
        config_name: which of its configurations (``"wikitext-2-raw-v1"``).

    Returns:
        Its splits ``train``, ``val`` and ``test``, as far as it has them.

    Raises:
        ValueError: there is no such data set, or it has no split ``train``.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    path = Path(name).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = load_from_disk(str(path))
        else:
            loaded = load_dataset(str(path) if path.is_dir() else name, config_name)
    except Exception as error:  # the hub's client has a dozen kinds, all with long messages
        raise ValueError(
            f"expected 'stdlib', a file, or a data set on the Hugging Face hub as source, got {name!r} "
            f"({type(error).__name__}: {one_line(error)}): correct the name, or check the network"
        ) from error
    splits = DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded
    called = {split: [name for name in names if name in splits] for split, names in SPLIT_NAMES.items()}
    found = {split: splits[names[0]] for split, names in called.items() if names}
    if "train" not in found:
        raise ValueError(
            f"expected a split 'train' in the data set {name!r}, got {', '.join(map(str, splits))}: pick "
            "another data set, or save its rows to a file"
        )
    return found


def require_column(rows: "Dataset", column: str, option: str, where: str) -> None:
    """Make sure that the rows have a column, and one of text where text is asked for.

    Args:
        rows: rows of one split.
        column: the column that is needed.
        option: the argument of the data module that names it.
        where: what the rows were read from, for the message.

    Raises:
        ValueError: there is no such column, and the message names those that exist; or it holds no text.
    """
    if column not in rows.column_names:
        raise ValueError(
            f"expected a column {column!r} in {where}, got the columns "
            f"{', '.join(map(repr, rows.column_names))}: {hint_of_header(rows.column_names)}pass {option}="
        )
    dtype = getattr(rows.features[column], "dtype", "a nested type")
    if option == "text_column" and dtype not in ("string", "large_string"):
        raise ValueError(
            f"expected text in the column {column!r} of {where}, got values of type {dtype}: pass "
            "text_column="
        )


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
    check_classes(rows[column][:], column, where)
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
        ValueError: a label that is not one of the classes, or a row without text.
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
                    f"{index + 1}: mend the row, or pass text_column="
                )
        keys = labels if declared else [str(label) for label in labels]
        unknown = sorted({str(key) for key in keys if not declared and key not in numbers})
        if unknown:
            places = rows_named([place for place, key in enumerate(keys) if key not in numbers])
            raise ValueError(
                f"expected one of the training labels {', '.join(map(repr, names))} in {where(split)}, got "
                f"{', '.join(map(repr, unknown))} in {places}: add such rows to the training data or take "
                "these out"
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


def set_apart(
    rows: "Dataset", fraction: float, text_column: str, labels: Sequence[Any] | None, *, seed: int, where: str
) -> "tuple[Dataset, Dataset]":
    """Split rows into those that stay and those that are taken to evaluate on.

    Args:
        rows: all of them.
        fraction: share to take: of every class, or, without labels, the last rows with that share of characters.
        text_column: column with the text.
        labels: one a row, or None.
        seed: of the choice within classes.
        where: the rows come from, for the message.

    Raises:
        ValueError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(
            f"expected at least two rows in {where} to set some apart for evaluation, got {len(rows)}: add text, "
            "or pass val_files="
        )
    if labels is not None:
        stay, taken = stratified_split(labels, fraction, seed)
        return rows.select(stay), rows.select(taken)
    lengths = [len(text) for text in texts_of(rows, text_column)]
    first, count = len(rows) - 1, lengths[-1]
    while first > 1 and count < fraction * sum(lengths):
        first -= 1
        count += lengths[first]
    return rows.select(range(first)), rows.select(range(first, len(rows)))


def texts_of(rows: "Dataset", column: str) -> Iterator[str]:
    """The texts of a column, empty ones for rows without."""
    for batch in rows.select_columns([column]).iter(batch_size=1000):
        yield from (text or "" for text in batch[column])
