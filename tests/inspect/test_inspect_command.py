"""The command: what it prints, writes and returns."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from packed import unpack
from refused import refusal

from lightning_qk import head_projections
from lightning_qk.cli import main
from lightning_qk.data.tokenizers import byte_tokenizer
from lightning_qk.functional import qk_moments


def test_a_table_of_layers(
    llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", str(llama)]) == 0
    seen = capsys.readouterr()
    assert seen.err == ""
    assert all(
        word in seen.out for word in ("LlamaForCausalLM", "layer_00", "layer_01", "eig var", "ρ/circle")
    )
    assert max(map(len, seen.out.splitlines())) <= 80
    text = " ".join(seen.out.split())
    assert "folded into the weights" in text
    assert "symm.: 1 symmetric, -1 antisymmetric" in text
    assert "rank: directions" in text
    assert "do not differ from random ones: a fresh model" in text
    assert not any(word in text for word in ("regime", "uniform", "saturated", "flagged", "verdict"))
    assert main(["inspect", str(llama), "--per-head", "--moments-only"]) == 0
    seen = capsys.readouterr()
    assert len(re.findall("layer_0", seen.out)) == 8
    assert "ρ/circle" not in seen.out
    assert "symm." in seen.out
    assert main(["inspect", str(llama), "--no-fold-norm"]) == 0
    assert "left out, as asked" in " ".join(capsys.readouterr().out.split())


def test_files_hold_what_was_read(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = [tmp_path / "new" / name for name in ("a.json", "a.csv", "a.html")]
    options = [f"--{path.suffix[1:]}={path}" for path in targets]
    assert main(["inspect", str(llama), "--per-head", *options]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    heads = head_projections(model)
    want = torch.stack([qk_moments(own.query, own.key)["eig_var"].detach() for own in heads.values()])
    found = json.loads(targets[0].read_text())["checkpoints"][0]
    assert found["values"]["qk/eig_var/max"] == pytest.approx(float(want.max()), rel=1e-4)
    assert found["layers"][1]["per_head"]["eig_var"] == pytest.approx(want[1].tolist(), rel=1e-3, abs=1e-6)
    assert [len(layer["eigenvalues"]) for layer in found["layers"]] == [4, 4]
    rows = list(csv.DictReader(targets[1].open()))
    assert [row["head"] for row in rows] == ["0", "1", "2", "3"] * 2
    assert [float(row["eig_var"]) for row in rows] == pytest.approx(
        want.flatten().tolist(), rel=1e-3, abs=1e-6
    )
    page = targets[2].read_text()
    assert page.startswith("<!doctype html>")
    assert "LlamaForCausalLM" in page
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.csv", "a.html", "a.json"]


def page_data(page: Path) -> tuple[dict[str, Any], Any]:
    """What a report carries."""
    packed = re.search(r'<script type="text/plain" id="data">([^<]+)<', page.read_text())
    assert packed is not None
    return unpack(packed[1])


def test_models_side_by_side_in_one_page(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.mul_(3)
    model.save_pretrained(other)
    page = tmp_path / "both.html"
    assert main(["inspect", str(llama), str(other), "--compare", "--html", str(page)]) == 0
    content, numbers = page_data(page)
    assert list(content["points"]) == ["0", "1"]
    assert content["points"]["1"] == str(other)
    radius = next(
        one for one in content["histories"]["spectrum"]["statistics"] if one["name"] == "spectral_radius"
    )
    values = numbers[radius["values"][0] : sum(radius["values"])].reshape(-1, 2)
    assert values[:, 1] == pytest.approx(3 * values[:, 0], rel=1e-3)
    assert len(content["eigenvalues"]) == 2


def test_standard_output_holds_json_alone(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(llama), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "eigenvalues" not in found["checkpoints"][0]["layers"][0]


def test_conditions_decide_the_status(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(llama), "--fail-on", "qk/asymmetry/max>1"]) == 0
    capsys.readouterr()
    line = ["inspect", str(llama), "--fail-on", "qk/asymmetry/max>1", "--fail-on", "qk/layer_01/asymmetry>=0"]
    assert main(line) == 1
    seen = capsys.readouterr()
    assert seen.err.count("\n") == 1
    assert "qk/layer_01/asymmetry>=0 holds of" in seen.err
    assert "unscaled" not in seen.err
    assert "layer_00" in seen.out
    # What the table has times the softmax scale.
    assert main(["inspect", str(llama), "--fail-on", "qk/eig_var/max>-1"]) == 1
    assert capsys.readouterr().err.endswith(" unscaled logits²\n")


def test_models_side_by_side(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(2.0)
    model.save_pretrained(tmp_path / "tuned")
    line = ["inspect", str(llama), str(tmp_path / "tuned"), "--compare"]
    assert main(line) == 0
    assert "tuned minus" in capsys.readouterr().out.replace("\n", "")
    assert main([*line, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    before, after = (one["values"]["qk/layer_01/trace"] for one in found["checkpoints"])
    assert after == pytest.approx(2 * before, rel=1e-5)
    changes = found["differences"][0]["values"]
    assert changes["qk/layer_00/trace"] == 0
    assert changes["qk/layer_01/trace"] == pytest.approx(before, rel=1e-4)
    models.gpt2().save_pretrained(tmp_path / "gpt2")
    assert main(["inspect", str(llama), str(tmp_path / "gpt2")]) == 0
    config = transformers.GPT2Config(n_layer=3, n_head=4, n_embd=32, vocab_size=50, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "deep")
    assert "same layers" in refusal(capsys, llama, tmp_path / "deep", "--compare")


def series(folder: Path, kind: str) -> None:
    """Three checkpoints of which the traces grow as the steps do."""
    model = models.llama()
    folder.mkdir()
    for step in (20, 100, 3):
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.k_proj.weight.copy_(step * layer.self_attn.q_proj.weight[:16])
        if kind == "transformers":
            model.save_pretrained(folder / f"checkpoint-{step}")
        else:
            state = {f"net.{name}": value for name, value in model.state_dict().items()}
            torch.save({"state_dict": state, "global_step": step}, folder / f"epoch={step}.ckpt")


@pytest.mark.parametrize("kind", ["transformers", "lightning"])
def test_a_folder_of_checkpoints_is_an_evolution(
    kind: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    series(folder, kind)
    options = ["--config", str(llama)] if kind == "lightning" else []
    page = tmp_path / "evolution.html"
    line = ["inspect", str(folder), "--html", str(page), *options]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "3 checkpoints" in out
    assert "at step 100" in out
    assert "3 kept steps up to 100" in page.read_text()
    content, _ = page_data(page)
    assert content["histories"]["spectrum"]["steps"] == [3, 20, 100]
    assert [entry["step"] for entry in content["eigenvalues"]] == [3, 20, 100]
    assert content["propagation"]["predicted"]
    assert main([*line, "--compare", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["step"] for one in found["checkpoints"]] == [3, 20, 100]
    traces = [one["values"]["qk/layer_00/trace"] for one in found["checkpoints"]]
    assert traces[2] / traces[0] == pytest.approx(100 / 3, rel=1e-3)
    assert found["differences"][0]["values"]["qk/layer_00/trace"] == pytest.approx(
        traces[2] - traces[0], rel=1e-3
    )


def test_a_model_with_checkpoints_beside_it(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(llama, llama / "checkpoint-5")
    assert main(["inspect", str(llama)]) == 0
    assert "pass --series" in capsys.readouterr().out
    assert main(["inspect", str(llama), "--series"]) == 0
    assert "at step 5" in capsys.readouterr().out


def test_folders_of_something_else_beside_a_model_are_no_checkpoints(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (llama / "1_Pooling").mkdir()
    (llama / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 384}')
    assert main(["inspect", str(llama)]) == 0
    assert "--series" not in capsys.readouterr().out


def test_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    tokenizer = byte_tokenizer()
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=4,
        n_embd=32,
        vocab_size=len(tokenizer),
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "gpt2")
    page = tmp_path / "text.html"
    line = ["inspect", str(tmp_path / "gpt2"), "--text", "stdlib", "--batches", "2", "--html", str(page)]
    assert "--tokenizer" in refusal(capsys, *line[1:])
    tokenizer.save_pretrained(tmp_path / "gpt2")
    assert main([*line, "--json", "-", "--fail-on", "attn/entropy_normalized/max>1.001"]) == 0
    found = json.loads(capsys.readouterr().out)["checkpoints"][0]
    assert found["facts"]["Text"] == "stdlib, 256 tokens in sequences of 32"
    assert not found["notes"]

    # The first sequences again, through the model's own attention weights.
    from lightning_qk.inspect.text import _blocks, read_text

    ids = _blocks(tokenizer, read_text("stdlib", 2 * 4 * 32 * 40), 32)[:8]
    eager = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2", attn_implementation="eager")
    with torch.no_grad():
        maps = eager(ids, output_attentions=True).attentions
    for layer, weights in zip(found["layers"], maps, strict=True):
        first = weights[..., 0].mean((0, 2))
        assert layer["per_head"]["sink_first"] == pytest.approx(first.tolist(), rel=1e-3)
    assert main(line) == 0
    assert "entropy" in capsys.readouterr().out


def test_text_that_a_model_cannot_take(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "that of another model" in refusal(capsys, llama, "--text", "stdlib", "--tokenizer", "bytes")
    assert "no such file" in refusal(capsys, llama, "--text", "nowhere.txt", "--tokenizer", "bytes").lower()
    (tmp_path / "empty.txt").write_text(" \n")
    assert "empty" in refusal(capsys, llama, "--text", tmp_path / "empty.txt", "--tokenizer", "bytes")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    assert "pixel_values" in refusal(capsys, tmp_path / "vit", "--text", "stdlib", "--tokenizer", "bytes")


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "inspect" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("exit status", "--fail-on", "--moments-only", "examples:"))
    assert max(map(len, out.splitlines())) <= 120
