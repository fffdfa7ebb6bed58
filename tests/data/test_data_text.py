"""The data module: sources, splits, cache, order, and bad input."""

import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset, DatasetDict

from lightning_qk import TextDataModule
from lightning_qk.data.tokenizers import byte_tokenizer

TSV = 'sentence\tlabel\na "good film\tpos\nbad\tneg\nso so\tneg\nNA\tpos\nnull\tpos\nfine\tneg\n'


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def build(**arguments: Any) -> TextDataModule:
        return TextDataModule(**{"cache_dir": str(tmp_path / "cache"), "batch_size": 2, **arguments})

    return build


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def prepared(data: TextDataModule) -> TextDataModule:
    data.prepare_data()
    data.setup()
    return data


def texts_of(data: TextDataModule, split: str) -> list[str]:
    return [data.tokenizer.decode(ids, skip_special_tokens=True) for ids in data._splits[split]["input_ids"]]


def test_blocks_are_the_lines_each_ended_by_eos(make: Any, tmp_path: Path) -> None:
    train = write(tmp_path / "train.txt", "one\n\n  \ntwo two\nthrée\n")
    data = prepared(make(source=train, val_files=write(tmp_path / "v.txt", "val line\n"), block_size=4))

    eos = data.tokenizer.eos_token_id
    stream = [*b"one", eos, *b"two two", eos, *"thrée".encode(), eos]
    assert [t for block in data._splits["train"]["input_ids"] for t in block] == stream[
        : len(stream) // 4 * 4
    ]
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].tolist() == [list(b"val "), list(b"line")]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_tables_of_every_kind_give_the_same_rows(make: Any, tmp_path: Path, suffix: str) -> None:
    content = (
        ['a, "b" c', "second\trow", "NA"] if suffix not in (".tsv",) else ['a, "b" c', "second row", "NA"]
    )
    path = tmp_path / f"rows{suffix}"
    rows = Dataset.from_dict({"body": content, "other": [1, 2, 3]})
    if suffix == ".csv":
        rows.to_csv(path, index=False)
    elif suffix == ".tsv":
        path.write_text("body\tother\n" + "".join(f"{text}\t0\n" for text in content))
    elif suffix == ".json":
        path.write_text(json.dumps([{"body": text, "other": 1} for text in content]))
    elif suffix == ".jsonl":
        rows.to_json(path)
    else:
        rows.to_parquet(path)
    data = prepared(make(source=str(path), val_files=str(path), text_column="body", block_size=1))

    tokens = [token for [token] in data._splits["train"]["input_ids"]]
    eos = data.tokenizer.eos_token_id
    assert tokens == [token for text in content for token in [*text.encode(), eos]]


def test_several_files_are_read_in_order(make: Any, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.txt", name * 4 + "\n") for name in "ba"]
    data = prepared(make(source=files, val_files=files, block_size=5))

    assert texts_of(data, "train") == ["bbbb", "aaaa"]


def test_tsv_for_classification(make: Any, tmp_path: Path) -> None:
    train = write(tmp_path / "train.tsv", TSV)
    data = prepared(
        make(
            source=train,
            val_files=train,
            task="sequence_classification",
            text_column="sentence",
            max_length=8,
        )
    )

    assert data.label_names == ["neg", "pos"]
    assert texts_of(data, "train") == ['a "goo', "bad", "so so", "NA", "null", "fine"]
    batches = list(data.val_dataloader())
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [1, 0, 0, 1, 1, 0]
    assert [batch["input_ids"].shape for batch in batches] == [(2, 8), (2, 7), (2, 6)]
    assert batches[0]["attention_mask"].sum(dim=1).tolist() == [8, 5]


def test_latin_1_text_with_its_encoding(make: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    path = str(tmp_path / "a.txt")
    data = prepared(make(source=path, val_files=path, encoding="latin-1", block_size=2))

    assert texts_of(data, "train") == ["é"]


def test_validation_is_the_end_of_the_text_where_there_is_none(make: Any, tmp_path: Path) -> None:
    lines = [f"{index:04}" for index in range(50)]
    data = prepared(make(source=write(tmp_path / "a.txt", "\n".join(lines)), val_fraction=0.2, block_size=5))

    assert texts_of(data, "train") == lines[:40]
    assert texts_of(data, "val") == lines[40:]


def test_validation_is_taken_within_classes(make: Any, tmp_path: Path) -> None:
    table = "text,label\n" + "".join(f"r{index},{'a' if index % 5 else 'b'}\n" for index in range(50))
    data = prepared(
        make(source=write(tmp_path / "a.csv", table), task="sequence_classification", val_fraction=0.2)
    )

    assert sorted(texts_of(data, "train") + texts_of(data, "val")) == sorted(
        f"r{index}" for index in range(50)
    )
    assert sorted(data._splits["val"]["labels"]) == [0] * 8 + [1] * 2


def test_stdlib_has_train_val_and_test(make: Any) -> None:
    data = prepared(make(max_characters=60_000, block_size=64))

    assert set(data._splits) == {"train", "val", "test"}
    text = "".join(texts_of(data, "train"))
    assert "def " in text
    assert "import " in text
    sizes = {name: len(split) for name, split in data._splits.items()}
    assert sum(sizes.values()) * 64 == pytest.approx(60_000, rel=0.02)
    assert next(iter(data.test_dataloader()))["input_ids"].shape == (2, 64)


def test_stdlib_for_classification_and_masked_lm(make: Any) -> None:
    data = prepared(make(task="sequence_classification", max_characters=50_000, max_length=32))
    assert data.label_names is not None
    assert len(data.label_names) >= 5
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"][:, 0].tolist() == [data.tokenizer.cls_token_id] * 2

    masked = prepared(make(task="masked_lm", max_characters=20_000, block_size=32))
    first, second = (next(iter(masked.val_dataloader())) for _ in range(2))
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert (first["labels"] != -100).any(dim=1).all()


def test_data_set_from_a_folder_with_declared_splits(make: Any, tmp_path: Path) -> None:
    parts = {name: Dataset.from_dict({"text": [name]}) for name in ("train", "validation", "test")}
    DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "hub").mkdir()
    for name, rows in parts.items():
        rows.to_parquet(str(tmp_path / "hub" / f"{name}-00000-of-00001.parquet"))

    for source in ("saved", "hub"):
        data = prepared(make(source=str(tmp_path / source), block_size=1))

        assert "".join(texts_of(data, "train")) == "train"
        assert "".join(texts_of(data, "val")) == "validation"
        assert "".join(texts_of(data, "test")) == "test"


def test_words_are_counted_in_the_training_text(make: Any, tmp_path: Path) -> None:
    train = write(tmp_path / "a.txt", "x y\nx z\n")
    val = write(tmp_path / "b.txt", "v x\n")
    first = make(source=train, val_files=val, tokenizer="words", vocab_size=10, block_size=3)
    with pytest.raises(ValueError, match="expected setup"):
        _ = first.tokenizer
    for data in (prepared(first), prepared(make(**arguments_of(first)))):
        assert set(data.tokenizer.get_vocab()) >= {"x", "y", "z"}
        assert data.tokenizer.decode(data._splits["val"][0]["input_ids"]) == "<unk> x <eos>"


def arguments_of(data: TextDataModule) -> dict[str, Any]:
    return {
        "source": data.sources,
        "val_files": data.files["val"],
        "tokenizer": "words",
        "vocab_size": data.vocab_size,
        "block_size": data.block_size,
    }


def test_a_second_run_does_not_tokenize_again(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt", "some text\n" * 20)
    prepared(make(source=path, block_size=8))
    calls: list[Path] = []
    original = TextDataModule._build

    def count(self: TextDataModule, folder: Path, *rest: Any) -> None:
        calls.append(folder)
        original(self, folder, *rest)

    monkeypatch.setattr(TextDataModule, "_build", count)

    again = prepared(make(source=path, block_size=8))
    assert calls == []
    assert "some text" in "".join(texts_of(again, "train"))
    # What does not change the data does not count; what does, does.
    prepared(make(source=path, block_size=8, batch_size=7, num_workers=0))
    assert calls == []
    prepared(make(source=path, block_size=9))
    assert len(calls) == 1
    write(tmp_path / "a.txt", "other text here\n" * 20)
    assert "other" in "".join(texts_of(prepared(make(source=path, block_size=8)), "train"))
    assert len(calls) == 2
    assert not list((tmp_path / "cache").glob("*.*")), "folders of the build are left over"


def test_a_tokenizer_is_part_of_the_key_by_its_content(make: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "some text\n" * 20)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    prepared(make(source=path, task="masked_lm", block_size=8, tokenizer=str(tmp_path / "tokenizer")))
    tokenizer.add_tokens(["some"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    data = prepared(make(source=path, task="masked_lm", block_size=8, tokenizer=str(tmp_path / "tokenizer")))

    assert 263 in data._splits["train"][0]["input_ids"]


def test_data_prepared_by_hand_follow_the_model_that_is_fitted(make: Any, tmp_path: Path) -> None:
    from types import SimpleNamespace

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["some"])
    tokenizer.save_pretrained(tmp_path / "model")
    path = write(tmp_path / "a.txt", "some text\n" * 20)
    data = prepared(make(source=path, task="masked_lm", block_size=8))
    assert "some" not in data.tokenizer.get_vocab()

    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=SimpleNamespace(pretrained=str(tmp_path / "model"))
    )
    data.prepare_data()
    data.setup()

    assert "some" in data.tokenizer.get_vocab()
    assert tokenizer.convert_tokens_to_ids("some") in data._splits["train"][0]["input_ids"]


def test_a_build_that_fails_leaves_nothing(make: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x\ny\n")
    with pytest.raises(ValueError, match="block"):
        prepared(make(source=path, block_size=1000))
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_runs_may_make_the_same_data_at_once(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt", "some text\n" * 20)
    original = TextDataModule._build
    others: list[TextDataModule] = []

    def while_another_finishes(self: TextDataModule, folder: Path, *rest: Any) -> None:
        monkeypatch.setattr(TextDataModule, "_build", original)
        others.append(prepared(make(source=path, block_size=8)))
        original(self, folder, *rest)

    monkeypatch.setattr(TextDataModule, "_build", while_another_finishes)
    # Whoever looks before the other has finished finds no folder; the move into place is what tells.
    monkeypatch.setattr(Path, "exists", lambda path: False)
    data = prepared(make(source=path, block_size=8))

    assert texts_of(data, "train") == texts_of(others[0], "train")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_order_of_training_follows_from_seed_and_epoch(make: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "".join(f"{index:03}\n" for index in range(40)))

    def orders(seed: int) -> list[list[int]]:
        data = prepared(make(source=path, val_files=path, block_size=4, batch_size=40, seed=seed))
        loader = data.train_dataloader()
        found = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            torch.rand(epoch + 1)  # what others draw changes nothing
            [batch] = list(loader)
            found.append(batch["input_ids"].tolist())
        return found

    first = orders(1)
    assert first == orders(1)
    assert first[0] != first[1]
    assert first != orders(2)
    assert sorted(first[0]) == sorted(first[1])


class _Seen(pl.LightningModule):
    """Notes which rows it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.rows: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.rows += batch["input_ids"].tolist()
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_gives_each_epoch_its_own_order(make: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "".join(f"{index:03}\n" for index in range(10)))
    module = _Seen()
    options: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    pl.Trainer(max_epochs=2, **options).fit(module, make(source=path, val_files=path, block_size=4))
    assert sorted(module.rows[:10]) == sorted(module.rows[10:])
    assert module.rows[:10] != module.rows[10:]

    module = _Seen()
    pl.Trainer(max_epochs=2, overfit_batches=1, **options).fit(
        module, make(source=path, val_files=path, block_size=4)
    )
    assert module.rows[:2] == module.rows[2:]


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("missing", {"source": "{tmp}/none.txt"}, "expected a text file, got no such file: .*none.txt"),
    ("missing val", {"source": "{tmp}/good.txt", "val_files": "{tmp}/none.txt"}, "no such file: .*none.txt"),
    ("folder", {"source": "{tmp}/folder.txt"}, "got a folder: .*folder.txt"),
    ("empty", {"source": "{tmp}/empty.txt"}, "expected text in .*empty.txt, got an empty file"),
    ("white", {"source": "{tmp}/white.txt"}, "got 0 tokens"),
    ("no rows", {"source": "{tmp}/header.csv"}, "expected text in .*header.csv, got no rows"),
    ("suffix", {"source": "{tmp}/a.pdf"}, r"expected a file that ends in \.txt, .*, got 'a\.pdf'"),
    ("two kinds", {"source": ["{tmp}/good.txt", "{tmp}/good.csv"]}, r"one kind, got \.csv and \.txt"),
    ("nothing", {"source": []}, "expected at least one file"),
    (
        "source",
        {"source": "no/such/thing"},
        "expected 'stdlib', a file, or a data set .* got 'no/such/thing'",
    ),
    (
        "bytes",
        {"source": "{tmp}/latin.txt"},
        r"utf-8 text in .*latin\.txt, got an invalid byte at position 1048580",
    ),
    ("encoding", {"source": "{tmp}/good.txt", "encoding": "utf-9"}, "got 'utf-9'"),
    ("json", {"source": "{tmp}/broken.json"}, "expected json rows .*broken.json"),
    (
        "short",
        {"source": "{tmp}/good.txt", "val_files": "{tmp}/good.txt"},
        "at least one block of 256 tokens",
    ),
    ("one row", {"source": "{tmp}/one.txt"}, "expected at least two rows"),
    (
        "column",
        {"source": "{tmp}/good.csv", "text_column": "txet"},
        r"expected a column 'txet' in .*good\.csv, got the columns 'text', 'label', 'number': pass text_column=",
    ),
    ("no text", {"source": "{tmp}/good.csv", "text_column": "number"}, "got values of type int64"),
    (
        "label",
        {"source": "{tmp}/good.csv", "task": "sequence_classification", "label_column": "class"},
        "expected a column 'class' .* pass label_column=",
    ),
    ("task", {"task": "causallm"}, "causal_lm, masked_lm, sequence_classification, got 'causallm'"),
    ("tokenizer", {"source": "{tmp}/good.txt", "tokenizer": "{tmp}/none"}, "as tokenizer, got '.*none'"),
    ("block", {"block_size": 0}, "expected block_size of at least 1, got 0"),
    ("files", {"max_files": 0}, "expected max_files of at least 1"),
    ("fraction", {"val_fraction": 1.0}, "expected a val_fraction between 0 and 1, got 1.0"),
    ("mask", {"mask_probability": 0.0}, "expected a mask_probability"),
]


@pytest.mark.parametrize(("arguments", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_gets_one_line(make: Any, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    (tmp_path / "folder.txt").mkdir()
    write(tmp_path / "good.txt", "a line\nanother line\n")
    write(tmp_path / "good.csv", "text,label,number\nx,a,1\ny,b,2\n")
    write(tmp_path / "header.csv", "text,label\n")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "white.txt", "\n \n")
    write(tmp_path / "one.txt", "just one")
    write(tmp_path / "broken.json", '{"text": "a"')
    write(tmp_path / "a.pdf", "x")
    # A character of two bytes lies across the edge of what is read at once.
    (tmp_path / "latin.txt").write_bytes(b"a" * 1048575 + "é".encode() + b"\nxx" + b"\xe9t\xe9")

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        return value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value

    with pytest.raises(ValueError) as caught:
        prepared(make(**{name: filled(value) for name, value in arguments.items()}))

    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_test_rows_that_are_not_there_are_told(make: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x\ny\n")
    data = prepared(make(source=path, val_files=path, block_size=2))

    with pytest.raises(ValueError, match=r"expected rows to test on, got none .*: pass test_files="):
        data.test_dataloader()
    assert len(data.predict_dataloader().dataset) == 2  # type: ignore[arg-type]


def test_batches_are_asked_for_after_setup(make: Any) -> None:
    data = make(source="one.txt")
    for ask in (data.train_dataloader, data.predict_dataloader):
        with pytest.raises(
            ValueError, match=r"expected a data module that is set up, .*: call prepare_data\(\)"
        ):
            ask()
