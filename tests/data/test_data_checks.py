"""Rows that cannot be meant are refused with their numbers, or dropped where asked; what is said of the data."""

import csv
from pathlib import Path

import pytest

from lightning_qk import TextDataModule

CLASSES = ("World", "Sports", "Business", "Sci/Tech")


def news(count: int = 40) -> list[list[str]]:
    """Rows as AG News has them: class, title, text with commas and quotation marks."""
    return [
        [CLASSES[place % 4], f"Title {place}", f'Text number {place}, with a comma and "quotes" in it.']
        for place in range(count)
    ]


def write(path: Path, rows: list[list[str]], header: bool = True) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        if header:
            writer.writerow(["label", "title", "text"])
        writer.writerows(rows)
    return str(path)


def prepared(source: str, tmp_path: Path, **options: object) -> TextDataModule:
    data = TextDataModule(
        source,
        "sequence_classification",
        tokenizer="bytes",
        max_length=32,
        cache_dir=str(tmp_path / "cache"),
        **options,
    )
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said at the start of a run."""
    lines: list[str] = []
    monkeypatch.setattr("lightning_qk.data.text.rank_zero_info", lines.append)
    return lines


def test_a_whole_file_trains_and_is_described(tmp_path: Path, said: list[str]) -> None:
    data = prepared(write(tmp_path / "news.csv", news()), tmp_path)
    assert data.label_names == sorted(CLASSES)
    train, val = (next(line for line in said if f"{name}:" in line) for name in ("train", "val"))
    assert "train: 36 rows of 32 to 32, median 32 tokens (36 fill max_length or are cut there)" in train
    assert "World 9" in train
    assert "such as 'Text number 0" in train
    assert "is World" in train
    assert "val: 4 rows" in val
    # A second run says the same of the data that were kept.
    before = list(said)
    prepared(str(tmp_path / "news.csv"), tmp_path)
    assert said == 2 * before


def test_a_missing_header_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path / "news.csv", news(), header=False)
    with pytest.raises(ValueError, match="its first row looks like data: add a header line"):
        prepared(path, tmp_path)


def test_a_row_whose_columns_are_shifted_is_refused_with_its_number(tmp_path: Path) -> None:
    rows = news()
    rows[20] = [*rows[20][1:], rows[20][0]]
    with pytest.raises(
        ValueError, match=r"got 'World' in 'text', .* label 'Title 20', .* in row 21: its columns"
    ):
        prepared(write(tmp_path / "news.csv", rows), tmp_path)
    # Columns between which the text stays where it is.
    rows[20] = ["Title 20 of some words", "World", "text"]
    with pytest.raises(ValueError, match=r"got 'World' in 'title', .* label 'Title 20 of some wo…'"):
        prepared(write(tmp_path / "news.csv", rows), tmp_path)
    # A text may be what a label is, and a class may have one row.
    rows[20] = ["Sports", "Title 20", "World"]
    rows[21][0] = "Weather"
    assert "Weather" in prepared(write(tmp_path / "news.csv", rows), tmp_path).label_names


@pytest.mark.parametrize("empty", ["", "  "])
@pytest.mark.parametrize(("column", "what"), [(0, "label"), (2, "text")])
def test_empty_fields_are_refused_with_their_rows_or_dropped(
    tmp_path: Path, said: list[str], column: int, what: str, empty: str
) -> None:
    rows = news()
    for place in (3, 7, 11, 19, 23, 30, 31):
        rows[place][column] = empty
    path = write(tmp_path / "news.csv", rows)
    with pytest.raises(
        ValueError, match=rf"expected a {what} in every row .* 7 rows \(rows 4, 8, 12, 20, 24 and 2"
    ):
        prepared(path, tmp_path)
    data = prepared(path, tmp_path, drop_incomplete=True)
    assert len(data.train_dataloader().dataset) + len(data.val_dataloader().dataset) == 33
    assert any("train: 7 rows without a text or a label are left out" in line for line in said)


@pytest.mark.parametrize("more", [["x"], []])
def test_a_row_of_another_width_is_refused_with_its_number(tmp_path: Path, more: list[str]) -> None:
    rows = news()
    rows[5] = [*rows[5], *more] if more else rows[5][:2]
    path = write(tmp_path / "news.csv", rows)
    with pytest.raises(
        ValueError, match=r"expected 3 fields .*label, title, text.*, got [24] in row 6 \(line 7\)"
    ):
        prepared(path, tmp_path)


def test_rows_wider_than_the_header_do_not_shift_the_columns(tmp_path: Path) -> None:
    """Read as they are, the first field becomes an index, and every label is a title."""
    path = tmp_path / "news.csv"
    write(path, [[str(place), *row] for place, row in enumerate(news())])
    with pytest.raises(ValueError, match="got 4 in row 1"):
        prepared(str(path), tmp_path)


def test_shifted_columns_are_seen_by_their_labels(tmp_path: Path) -> None:
    shifted = [[row[2], row[0], row[1]] for row in news()]
    with pytest.raises(ValueError, match=r"expected a few classes .*got 40 different labels in 40 rows"):
        prepared(write(tmp_path / "news.csv", shifted), tmp_path)


def test_unknown_labels_to_validate_on_are_refused_with_their_rows(tmp_path: Path) -> None:
    train = write(tmp_path / "news.csv", news())
    strange = news(8)
    strange[2][0] = "Weather"
    val = write(tmp_path / "val.csv", strange)
    with pytest.raises(ValueError, match=r"got 'Weather' in row 3"):
        prepared(train, tmp_path, val_files=val)


def test_rows_that_are_trained_and_validated_on_are_told(tmp_path: Path, said: list[str]) -> None:
    train = write(tmp_path / "news.csv", news())
    other = [[row[0], row[1], f"Other {row[2]}"] for row in news(6)]
    prepared(train, tmp_path, val_files=write(tmp_path / "val.csv", other + news(2)))
    assert any("2 of 8 texts of val (25.0%) are training rows too" in line for line in said)


def test_language_modelling_says_blocks_and_long_documents_alone(tmp_path: Path, said: list[str]) -> None:
    long = "A document that is long enough for an equal one to be no chance, since nobody writes it twice."
    (tmp_path / "a.txt").write_text("\n".join(["= Title =", long, *(f"line {n}" for n in range(50))]))
    (tmp_path / "b.txt").write_text("\n".join(["= Title =", long, *(f"row {n}" for n in range(50))]))
    data = TextDataModule(
        str(tmp_path / "a.txt"),
        val_files=str(tmp_path / "b.txt"),
        tokenizer="bytes",
        block_size=16,
        cache_dir=str(tmp_path / "cache"),
    )
    data.prepare_data()
    data.setup()
    assert any("train: " in line and "blocks of 16 tokens; such as '= Title ='" in line for line in said)
    assert any("1 of 1 texts of val (100.0%) are training rows too" in line for line in said)
