"""The ready-made data module: text to batches for language modelling and classification."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, DistributedSampler

from lightning_qk.data.cache import kept
from lightning_qk.data.checks import complete_rows, describe_overlap, describe_split
from lightning_qk.data.sources import (
    check_files,
    encode_labels,
    label_names,
    looks_like_file,
    read_dataset,
    read_files,
    require_column,
    set_apart,
    texts_of,
)
from lightning_qk.data.tokenizers import load_tokenizer, tokenize_blocks, tokenize_texts, word_tokenizer
from lightning_qk.tasks import TEXT_TASKS, check_task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Part of the cache's key: raise it when the same arguments give other data.
_FORMAT = 2
_TEST_FRACTION = 0.1
_LONG = 80
"""Characters of a document above which an equal one is no chance."""


class TextDataModule(pl.LightningDataModule):
    """Text from files, from a data set, or from this machine's standard library, ready for a transformer.

    For ``causal_lm`` and ``masked_lm`` the documents (rows) are tokenized, ended by the tokenizer's eos (else
    sep) token, put one after the other and cut into blocks; rows of white space are left out. For
    ``sequence_classification`` each row is one text, padded to the longest of its batch.

    The result is kept on disk under a key of everything that it depends on, so that a second run does not
    tokenize again. After :meth:`setup`, ``tokenizer`` and ``label_names`` describe what a model has to fit.

    Args:
        source: ``"stdlib"``: the Python standard library (for classification: functions, labelled by their
            package); one or more ``.txt``, ``.csv``, ``.tsv``, ``.json``, ``.jsonl`` or ``.parquet`` files to
            train on; or a data set: a folder or a name on the Hugging Face hub.
        task: ``"causal_lm"``, ``"masked_lm"`` or ``"sequence_classification"``.
        tokenizer: ``"bytes"``: needs no file; ``"words"``: the most frequent words of the training text; else
            a folder or a name on the Hugging Face hub. None is that of the pretrained model that the trainer
            has, and bytes where it has none.
        config_name: which configuration of a data set on the hub.
        val_files: files to validate on. Without them and without a validation split in the data set, a part
            of the training rows is taken.
        test_files: files to test on.
        text_column: column with the text.
        label_column: column with the label, a string or an integer. For classification only.
        encoding: of text files.
        vocab_size: of the tokenizer ``"words"``.
        block_size: tokens a block for language modelling.
        max_length: tokens a text for classification; longer ones are cut.
        mask_probability: chance of a token to be masked for ``masked_lm``.
        val_fraction: share of the training rows to validate on, where there is nothing else: the last ones by
            number of characters for language modelling, a random choice within each class for classification.
        batch_size: rows a batch, on each device.
        num_workers: processes that make batches.
        seed: of the order of rows in training, the split and the masks in evaluation.
        max_files: with ``"stdlib"``, how many files at most.
        max_characters: with ``"stdlib"``, how many characters at most.
        drop_incomplete: leave out rows without a text or a label, for classification, and say how many; they
            are refused otherwise. For language modelling rows without text are left out always.
        cache_dir: where results are kept; None is ``lightning_qk`` in the cache of ``datasets``.

    Raises:
        ValueError: an argument is out of range; :meth:`prepare_data` and :meth:`setup` raise it for files,
            columns and labels that do not fit.
    """

    def __init__(
        self,
        source: str | list[str] = "stdlib",
        task: str = "causal_lm",
        tokenizer: str | None = None,
        *,
        config_name: str | None = None,
        val_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        text_column: str = "text",
        label_column: str = "label",
        encoding: str = "utf-8",
        vocab_size: int = 10_000,
        block_size: int = 256,
        max_length: int = 128,
        mask_probability: float = 0.15,
        val_fraction: float = 0.1,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        max_files: int | None = None,
        max_characters: int | None = None,
        drop_incomplete: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        check_task(task, TEXT_TASKS)
        for name, number in (
            ("block_size", block_size),
            ("max_length", max_length),
            ("batch_size", batch_size),
        ):
            if number < 1:
                raise ValueError(f"expected {name} of at least 1, got {number}: raise it")
        for name, bound in (("max_files", max_files), ("max_characters", max_characters)):
            if bound is not None and bound < 1:
                raise ValueError(
                    f"expected {name} of at least 1, or null for no bound, got {bound}: raise it"
                )
        if not 0 < val_fraction < 1:
            raise ValueError(f"expected a val_fraction between 0 and 1, got {val_fraction}: correct it")
        if not 0 < mask_probability <= 1:
            raise ValueError(f"expected a mask_probability in (0, 1], got {mask_probability}: correct it")
        self.sources = [source] if isinstance(source, str) else list(source)
        self.task = task
        self.config_name = config_name
        self.files = {
            "val": [val_files] if isinstance(val_files, str) else list(val_files or []),
            "test": [test_files] if isinstance(test_files, str) else list(test_files or []),
        }
        self.text_column = text_column
        self.label_column = label_column
        self.encoding = encoding
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.max_length = max_length
        self.mask_probability = mask_probability
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.max_files = max_files
        self.max_characters = max_characters
        self.drop_incomplete = drop_incomplete
        self.cache_dir = cache_dir
        self.label_names: list[str] | None = None
        self._tokenizer_name = tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tokenizer_digest: Any = None
        self._tokenizer_of: str | None = None
        self._splits: dict[str, Dataset] = {}

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer; ``"words"`` has one after :meth:`setup`.

        Raises:
            ValueError: it is not there yet.
        """
        if self._tokenizer is None:
            if self._tokenizer_name == "words":
                raise ValueError(
                    "expected setup() before the tokenizer 'words' is used, got a data module that has not "
                    "counted the words yet: call prepare_data() and setup()"
                )
            pretrained = self._pretrained()
            if self._tokenizer_name or not pretrained:
                self._tokenizer = load_tokenizer(self._tokenizer_name or "bytes")
            else:
                self._tokenizer = load_tokenizer(pretrained, "model with its tokenizer")
            self._tokenizer_of = None if self._tokenizer_name else pretrained
        return self._tokenizer

    def _pretrained(self) -> str | None:
        """The pretrained model of the trainer's module, whose tokenizer is the default."""
        return getattr(getattr(self.trainer, "lightning_module", None), "pretrained", None)

    def _follow_the_model(self) -> None:
        """Start over where data were prepared by hand before there was a trainer, with another tokenizer."""
        if (
            self._tokenizer_name
            or self._tokenizer is None
            or self._pretrained() in (None, self._tokenizer_of)
        ):
            return
        self._tokenizer, self._tokenizer_digest, self._splits = None, None, {}

    def prepare_data(self) -> None:
        """Read, tokenize and keep the data; Lightning calls it on one process."""
        self._follow_the_model()
        self._entry()

    def setup(self, stage: str | None = None) -> None:
        """Open the data that :meth:`prepare_data` left; Lightning calls it on every process."""
        self._follow_the_model()
        if self._splits:
            return
        from datasets import load_from_disk
        from transformers import AutoTokenizer

        entry = self._entry()
        info = json.loads((entry / "info.json").read_text(encoding="utf-8"))
        if self._tokenizer_name == "words":
            self._tokenizer = AutoTokenizer.from_pretrained(entry / "tokenizer")
        self.label_names = info["label_names"]
        for line in info["summary"]:
            rank_zero_info(f"lightning-qk: {line}")
        self._splits = {name: load_from_disk(str(entry / name)) for name in info["splits"]}

    @property
    def facts(self) -> dict[str, Any]:
        """What the data are, as plain values; ``rows`` of each split are known after :meth:`setup`."""
        classifies = self.task == "sequence_classification"
        facts: dict[str, Any] = {
            "source": self._where(),
            **({"config_name": self.config_name} if self.config_name else {}),
            **{f"{name}_files": ", ".join(files) for name, files in self.files.items() if files},
            "tokenizer": self._tokenizer_name or self._tokenizer_of or "bytes",
            "max_length" if classifies else "block_size": self.max_length if classifies else self.block_size,
            "batch_size": self.batch_size,
        }
        if self._splits:
            facts["rows"] = {name: len(rows) for name, rows in self._splits.items()}
        return facts

    def train_dataloader(self) -> DataLoader:
        """Batches to train on. Their order follows from ``seed`` and the epoch alone."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        """Batches to validate on."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """Batches to test on.

        Raises:
            ValueError: the source has no test rows.
        """
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Batches to predict: the test rows, or the validation rows where there are none."""
        return self._loader("test" if "test" in self._splits else "val")

    def _loader(self, split: str) -> DataLoader:
        if not self._splits:
            raise ValueError(
                "expected a data module that is set up, got one that is not: call prepare_data() and setup() first"
            )
        if split not in self._splits:
            raise ValueError(
                f"expected rows to {split} on, got none from {self._where()}: pass {split}_files="
            )
        data: Any = self._splits[split]
        training = split == "train"
        sampler: DistributedSampler | None = None
        if training:
            # Torch's sampler for many processes is also one whose order depends on (seed, epoch) alone:
            # nothing else that draws random numbers changes it, and a resumed run goes on with the right
            # epoch.
            processes = self.trainer.world_size if self.trainer else 1
            rank = self.trainer.global_rank if self.trainer else 0
            sampler = DistributedSampler(
                data, num_replicas=processes, rank=rank, shuffle=True, seed=self.seed
            )
        return DataLoader(
            data,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self._collator(training),
        )

    def _collator(self, training: bool) -> Any:
        from lightning_qk.data.collate import BlockCollator, MaskingCollator, PaddingCollator

        if self.task == "causal_lm":
            return BlockCollator()
        if self.task == "masked_lm":
            return MaskingCollator(self.tokenizer, self.mask_probability, None if training else self.seed)
        return PaddingCollator(self.tokenizer)

    def _where(self) -> str:
        return ", ".join(self.sources)

    def _entry(self) -> Path:
        """The folder with the data, made if it is not there."""
        from datasets import config

        root = (
            Path(self.cache_dir).expanduser()
            if self.cache_dir
            else Path(config.HF_DATASETS_CACHE) / "lightning_qk"
        )
        # Files are looked at on every run, so that one that is gone or changed is not missed.
        files = {name: check_files(paths) for name, paths in self.files.items() if paths}
        hub: dict[str, Dataset] = {}
        if len(self.sources) != 1 or looks_like_file(self.sources[0]):
            files["train"] = check_files(self.sources)
        elif self.sources != ["stdlib"]:
            hub = read_dataset(self.sources[0], self.config_name)
        key = {
            "format": _FORMAT,
            "files": {
                name: [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
                for name, paths in sorted(files.items())
            },
            "hub": {name: rows._fingerprint for name, rows in sorted(hub.items())},
            "source": self._source_key(),
            "task": self.task,
            "tokenizer": self._tokenizer_key(),
            "columns": [self.text_column, self.label_column],
            "encoding": self.encoding,
            "length": self.max_length if self.task == "sequence_classification" else self.block_size,
            "split": [self.val_fraction, self.seed],
            "drop_incomplete": self.drop_incomplete,
        }
        return kept(root, key, lambda build: self._build(build, files, hub))

    def _source_key(self) -> list[Any]:
        if self.sources != ["stdlib"]:
            return []
        import platform
        import sysconfig

        return [
            platform.python_version(),
            sysconfig.get_paths()["stdlib"],
            self.max_files,
            self.max_characters,
        ]

    def _tokenizer_key(self) -> Any:
        if self._tokenizer_name == "words":
            return ["words", self.vocab_size]
        # Once, since a tokenizer's state changes when it is used with truncation.
        if self._tokenizer_digest is None:
            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            text = (
                backend.to_str()
                if backend is not None
                else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
            )
            text += json.dumps(self.tokenizer.special_tokens_map, default=str)
            self._tokenizer_digest = hashlib.sha256(text.encode()).hexdigest()
        return self._tokenizer_digest

    def _build(self, folder: Path, files: dict[str, list[Path]], hub: "dict[str, Dataset]") -> None:
        rows = self._read(folder, files, hub)
        for name, split in rows.items():
            require_column(split, self.text_column, "text_column", self._place(name))
        names: list[str] | None = None
        summary = []
        if self.task == "sequence_classification":
            for name, split in rows.items():
                place = self._place(name)
                require_column(split, self.label_column, "label_column", place)
                rows[name], dropped = complete_rows(
                    split, self.text_column, self.label_column, place, self.drop_incomplete
                )
                if dropped:
                    summary.append(f"{name}: {dropped} rows without a text or a label are left out")
            names = label_names(rows["train"], self.label_column, self._place("train"))
            rows = encode_labels(rows, self.label_column, names, self.text_column, self._place)
        for name, split in rows.items():
            if not len(split):
                raise ValueError(
                    f"expected text in {self._place(name)}, got no rows: fill it or leave it out"
                )
        if "val" not in rows:
            rows["train"], rows["val"] = self._set_apart(rows["train"], self.val_fraction)
        if self._tokenizer_name == "words":
            self._tokenizer = word_tokenizer(texts_of(rows["train"], self.text_column), self.vocab_size)
            self._tokenizer.save_pretrained(folder / "tokenizer")
        for name, split in rows.items():
            cache = folder / f"{name}.tokens"
            if self.task == "sequence_classification":
                columns = [self.text_column, self.label_column]
                tokenized = tokenize_texts(split, self.tokenizer, columns, self.max_length, cache)
            else:
                masked, where = self.task == "masked_lm", f"to {name} on from {self._place(name)}"
                tokenized = tokenize_blocks(
                    split,
                    self.tokenizer,
                    self.text_column,
                    self.block_size,
                    cache,
                    around=masked,
                    where=where,
                )
            tokenized.save_to_disk(str(folder / name))
            summary += self._summary(name, rows, tokenized, names)
        for leftover in folder.glob("*.tokens"):
            leftover.unlink()
        shutil.rmtree(folder / "arrow", ignore_errors=True)
        info = {"label_names": names, "splits": list(rows), "summary": summary}
        (folder / "info.json").write_text(json.dumps(info), encoding="utf-8")

    def _summary(
        self, name: str, rows: "dict[str, Dataset]", tokenized: "Dataset", names: list[str] | None
    ) -> list[str]:
        """Lines on a split for the start of a run."""
        split = rows[name]
        if names is None:
            texts = [
                text
                for text in texts_of(split.select(range(min(len(split), 100))), self.text_column)
                if text.strip()
            ]
            lengths = [self.block_size] * len(tokenized)
            lines = [describe_split(name, texts, lengths)]
        else:
            lengths = [len(ids) for ids in tokenized["input_ids"][:]]
            lines = [
                describe_split(
                    name,
                    split[self.text_column][:1],
                    lengths,
                    most=self.max_length,
                    labels=split[self.label_column][:],
                    names=names,
                )
            ]
        if name != "train":
            train = texts_of(rows["train"], self.text_column)
            least = _LONG if names is None else 1
            overlap = describe_overlap(name, texts_of(split, self.text_column), train, least=least)
            lines += [overlap] if overlap else []
        return lines

    def _place(self, split: str) -> str:
        return ", ".join(self.files.get(split) or self.sources)

    def _read(
        self, folder: Path, files: dict[str, list[Path]], hub: "dict[str, Dataset]"
    ) -> "dict[str, Dataset]":
        rows = dict(hub)
        if self.sources == ["stdlib"]:
            rows["train"], rows["test"] = self._read_stdlib()
        for name, paths in files.items():
            rows[name] = read_files(paths, folder / "arrow", encoding=self.encoding)
        return {name: rows[name] for name in ("train", "val", "test") if name in rows}

    def _read_stdlib(self) -> "tuple[Dataset, Dataset]":
        from datasets import Dataset

        from lightning_qk.data.stdlib import stdlib_snippets, stdlib_texts

        if self.task == "sequence_classification":
            texts, labels = stdlib_snippets(self.max_files, self.max_characters)
            rows = Dataset.from_dict({self.text_column: texts, self.label_column: labels})
        else:
            rows = Dataset.from_dict({self.text_column: stdlib_texts(self.max_files, self.max_characters)})
        return self._set_apart(rows, _TEST_FRACTION)

    def _set_apart(self, rows: "Dataset", fraction: float) -> "tuple[Dataset, Dataset]":
        labels = rows[self.label_column] if self.task == "sequence_classification" else None
        return set_apart(rows, fraction, self.text_column, labels, seed=self.seed, where=self._where())
