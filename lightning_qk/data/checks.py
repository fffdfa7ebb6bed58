"""Rows that cannot be meant: refused with their numbers, or dropped where asked; and what a split looks like."""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lightning_qk._printable import listed

if TYPE_CHECKING:
    from datasets import Dataset

_FEW = 20
"""Rows below which every row may be a class of its own."""
_MOST_LOOKED_AT = 1000
"""Rows with a class of their own that are looked at for shifted columns."""
_EXAMPLE = 60
"""Characters of an example."""


def check_fields(path: Path, *, encoding: str = "utf-8") -> None:
    """Make sure that every row of a .csv or .tsv file has as many fields as the header.

    The parser would shift the columns of a file whose rows are wider, and fill up those of a row that is shorter.

    Raises:
        ValueError: a row has more fields, or fewer; the message has its number, the first row below the header
            being 1, and its line.
    """
    if path.suffix.lower() == ".tsv":
        options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    else:
        options = {}
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding=encoding, newline="") as file:
            reader = csv.reader(file, **options)
            header: list[str] | None = None
            row = 0
            for fields in reader:
                if not fields:
                    continue
                if header is None:
                    header = fields
                    continue
                row += 1
                if len(fields) != len(header):
                    raise ValueError(
                        f"expected {len(header)} fields in every row of {path}, as in its header "
                        f"({listed(map(_short, header))}), got {len(fields)} in row {row} (line "
                        f"{reader.line_num}): "
                        "mend the row, add the header, or put fields with the separator in them in quotes"
                    )
    except csv.Error:
        return  # the parser's own complaint comes when the file is read
    finally:
        csv.field_size_limit(limit)


def hint_of_header(columns: Sequence[str]) -> str:
    """The message for a first row that is not a header: names that are numbers, or as long as text."""
    strange = [name for name in columns if name.strip().lstrip("-").isdigit() or len(name) > 40]
    return "its first row looks like data: add a header line, or " if strange else ""


def complete_rows(rows: "Dataset", text: str, label: str, where: str, drop: bool) -> "tuple[Dataset, int]":
    """Rows that have a text and a label.

    Args:
        rows: of one split.
        text: column with the text.
        label: column with the labels.
        where: what they were read from, for messages.
        drop: leave out rows without a text or a label in place of refusing them.

    Returns:
        The rows, and how many were dropped.

    Raises:
        ValueError: rows without, or whose columns are shifted, with their numbers, the first being 1.
    """
    _check_shifted(rows, text, label, where)
    missing: dict[str, list[int]] = {"text": [], "label": []}
    for place, (words, name) in enumerate(zip(rows[text][:], rows[label][:], strict=True)):
        if words is None or (isinstance(words, str) and not words.strip()):
            missing["text"].append(place)
        if name is None or name != name or (isinstance(name, str) and not name.strip()):
            missing["label"].append(place)
    gone = {place for places in missing.values() for place in places}
    if not gone:
        return rows, 0
    if drop:
        return rows.select([place for place in range(len(rows)) if place not in gone]), len(gone)
    what, places = next((what, places) for what, places in missing.items() if places)
    column = text if what == "text" else label
    raise ValueError(
        f"expected a {what} in every row of {where}, got none in the column {column!r} of "
        f"{rows_named(places)}: fill them, or pass drop_incomplete=True to leave such rows out"
    )


def _check_shifted(rows: "Dataset", text: str, label: str, where: str) -> None:
    """Raises ValueError where a row has a class of its own for a label, and the label of others elsewhere.

    Elsewhere is the text, or any column where that class has a longer name than those of others: a row's number
    may be what a label is.
    """
    labels = list(map(str, rows[label][:]))
    counts = Counter(labels)
    longest = max((len(name) for name, count in counts.items() if count > 1), default=0)
    own = [place for place, name in enumerate(labels) if counts[name] == 1]
    # As many classes as rows are another fault.
    found = []
    for place in own[:_MOST_LOOKED_AT] if 2 * len(own) < len(labels) else ():
        fields = {column: str(value).strip() for column, value in rows[place].items() if column != label}
        asked = fields if len(labels[place]) > longest else {text: fields[text]}
        column = next((column for column, value in asked.items() if counts[value] > 1), None)
        if column is not None:
            found.append((place, column, fields[column]))
    if found:
        place, column, value = found[0]
        raise ValueError(
            f"expected a text in the column {text!r} and a label in {label!r} of {where}, got {_short(value)!r} "
            f"in {column!r}, which is a label elsewhere, and the label {_short(labels[place])!r}, which is in no "
            f"other row, in {rows_named([one for one, *_ in found])}: its columns are shifted; mend them"
        )


def check_classes(labels: Iterable[Any], column: str, where: str) -> None:
    """Raises ValueError where labels are as many as rows, which is what text in the label's column looks like."""
    counts = Counter(labels)
    total = sum(counts.values())
    if total >= _FEW and 2 * len(counts) > total:
        first = next(iter(counts))
        raise ValueError(
            f"expected a few classes in the column {column!r} of {where}, got {len(counts)} different labels in "
            f"{total} rows (row 1: {_short(str(first))!r}): its columns may be shifted; mend them, or pass "
            "label_column="
        )


def rows_named(places: Sequence[int]) -> str:
    """Numbers of rows for a sentence, the first row being 1."""
    numbers = [str(place + 1) for place in places]
    if len(numbers) == 1:
        return f"row {numbers[0]}"
    return f"{len(numbers)} rows (rows {listed(numbers)})"


def describe_split(
    name: str,
    texts: Sequence[str],
    lengths: Sequence[int],
    *,
    most: int | None = None,
    labels: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> str:
    """One line on a split: rows, classes with their counts, lengths in tokens, an example.

    Args:
        name: of the split.
        texts: of its rows, some of them at least.
        lengths: tokens of each row, or of each block.
        most: tokens after which texts are cut.
        labels: number of each row's class.
        names: of the classes.
    """
    if labels is None or names is None:
        unit, sizes = "block", str(lengths[0])
    else:
        unit, sizes = "row", f"{min(lengths)} to {max(lengths)}, median {median(lengths):g}"
    line = f"{name}: {len(lengths)} {unit}{'s' * (len(lengths) != 1)} of {sizes} tokens"
    cut = 0 if most is None else sum(length >= most for length in lengths)
    if cut:
        line += f" ({cut} fill max_length or are cut there)"
    if labels is not None and names is not None:
        counts = Counter(labels)
        shown = [f"{names[place]} {count}" for place, count in counts.most_common()]
        line += f"; classes: {listed(shown)}"
        unseen = len(names) - len(counts)
        line += f", {unseen} without rows" if unseen else ""
    if texts:
        of = "" if labels is None or names is None else f" is {names[labels[0]]}"
        line += f"; such as {_short(texts[0], _EXAMPLE)!r}{of}"
    return line


def describe_overlap(name: str, texts: Iterable[str], train: Iterable[str], *, least: int = 1) -> str | None:
    """What to say where texts to evaluate on are also trained on; None where none is.

    Args:
        name: of the split to evaluate on.
        texts: of it.
        train: texts of the training rows.
        least: characters of a text that counts; short lines are alike in all books.
    """
    known = {hash(text.strip()) for text in train}
    found = [hash(text.strip()) in known for text in texts if len(text.strip()) >= least]
    if not any(found):
        return None
    share = sum(found) / len(found)
    return (
        f"{sum(found)} of {len(found)} texts of {name} ({share:.1%}) are training rows too: what is measured "
        "there is better than on new text"
    )


def _short(text: str, most: int = 20) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
