"""``lightning-qk verify``: right models pass, one that computes something else fails, wrong lines are told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.llama import modeling_llama

from lightning_qk.cli import main
from lightning_qk.verification import statistics

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
IMAGES = {**SMALL, "image_size": 32, "patch_size": 8}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, num_hidden_layers=2, vocab_size=300))


def t5() -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=300, decoder_start_token_id=0))


def vit() -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(**IMAGES, num_hidden_layers=2))


def whisper() -> PreTrainedModel:
    stacks = {
        f"{stack}_{what}": size
        for stack in ("encoder", "decoder")
        for what, size in {"layers": 1, "attention_heads": 4, "ffn_dim": 32}.items()
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(
        d_model=32, **stacks, **tokens, vocab_size=300, max_source_positions=50, num_mel_bins=16
    )
    return WhisperForConditionalGeneration(config)


def clip() -> PreTrainedModel:
    text, images = ({**sizes, "num_hidden_layers": 1} for sizes in (SMALL, IMAGES))
    return CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 300}, vision_config=images))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_is_verified_on_a_text(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    Path("text.txt").write_text("The weights that were read are those that attention computes with. " * 4)
    line = ["verify", str(folder), "--text", "text.txt", "--tokenizer", "bytes", "--json", "found.json"]
    assert main([*line, "--length", "24"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "q and k verified on 2 of 2 layers, statistics on 2 of 2" in printed
    assert printed.count("│ verified │") == 2
    assert "input_ids 2×24" in printed
    assert "text.txt" in printed
    found = json.loads(Path("found.json").read_text())
    assert found["verified"] is True
    assert [layer["label"] for layer in found["layers"]] == ["layer_00", "layer_01"]
    for layer in found["layers"]:
        assert layer["weights"]["status"] == "verified"
        assert 0 <= layer["weights"]["query"] < 1e-5
        assert 0 <= layer["weights"]["key"] < 1e-5
        assert 0 < layer["statistics"]["error"] < 1e-5


@pytest.mark.parametrize(("make", "layers"), [(t5, 3), (vit, 2), (whisper, 3), (clip, 2)])
def test_other_kinds_of_models_get_inputs(
    make: Any, layers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make().save_pretrained(tmp_path / "model")
    assert main(["verify", str(tmp_path / "model"), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == layers
    assert all(layer["weights"]["status"] == "verified" for layer in found["layers"])
    assert all(layer["statistics"]["verified"] for layer in found["layers"])


def test_a_forward_that_is_not_what_was_read_fails(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = modeling_llama.apply_rotary_pos_emb

    def tampered(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        query, key = right(query, key, *args, **kwargs)
        return query.roll(1, dims=-2) * query.abs(), key

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", tampered)
    assert main(["verify", str(folder)]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("differs │") == 2
    assert "layer_00, layer_01: q and k: its queries are not W x + b" in printed
    assert "q and k verified on 0 of 2 layers, statistics on 2 of 2" in printed


def test_statistics_that_are_off_fail(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = statistics.means

    def off(*args: Any, **kwargs: Any) -> Any:
        found = right(*args, **kwargs)
        return {**found, "entropy": found["entropy"] * 1.01}

    monkeypatch.setattr(statistics, "means", off)
    assert main(["verify", str(folder)]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "layer_00, layer_01: statistics: its entropy is off" in printed
    assert "q and k verified on 2 of 2 layers, statistics on 0 of 2" in printed


def test_weights_that_the_checkpoint_lacks_are_not_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama()
    lacking = {
        name: tensor for name, tensor in model.state_dict().items() if "layers.1.self_attn.q_proj" not in name
    }
    model.save_pretrained(tmp_path / "model", state_dict=lacking)
    assert main(["verify", str(tmp_path / "model"), "--json", "-"]) == 1
    first, second = json.loads(capsys.readouterr().out)["layers"]
    assert first["verified"]
    assert not second["verified"]
    assert second["weights"]["query"] is None
    assert "lacks 'model.layers.1.self_attn.q_proj.weight'" in second["weights"]["reason"]


def test_wrong_lines_are_told_in_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MambaModel(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=300)).save_pretrained(
        tmp_path / "mamba"
    )
    vit().save_pretrained(tmp_path / "vit")
    Path("short.txt").write_text("ab")
    capsys.readouterr()
    for wrong, hint in {
        ("./none",): "got './none', which does not exist",
        (): "expected CHECKPOINT, got none",
        (str(folder), "--lenght", "9"): "did you mean '--length'?",
        (str(folder), "--length", "3"): "expected --length of at least 4, got 3",
        (str(folder), "--json", "."): "got the folder .",
        (str(folder), "--text", "none.txt"): "",
        (str(folder), "--text", "short.txt", "--tokenizer", "bytes"): "at least 4 tokens",
        (str(tmp_path / "mamba"),): "which has none",
        (str(tmp_path / "vit"), "--text", "short.txt"): "expected a model of text",
    }.items():
        assert main(["verify", *wrong]) == 2, wrong
        error = capsys.readouterr().err
        assert error.startswith("lightning-qk: error: expected"), error
        assert hint in error
        assert error.count("\n") == 1
