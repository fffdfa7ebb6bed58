"""The command: what it prints, writes and returns, and what it says of bad input."""

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
import transformers
from packed import unpack
from torch import nn

from lightning_qk import head_projections
from lightning_qk.cli import inspect as command_module
from lightning_qk.cli import main
from lightning_qk.data.tokenizers import byte_tokenizer
from lightning_qk.functional import qk_moments
from lightning_qk.inspect import read as reading_module


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in shards, and a wide terminal."""
    monkeypatch.setenv("COLUMNS", "140")
    models.llama().save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    return tmp_path / "llama"


def refusal(capsys: pytest.CaptureFixture[str], *line: str | Path) -> str:
    """What is said of a line that is refused: one line on standard error and status 2."""
    capsys.readouterr()
    assert main(["inspect", *map(str, line)]) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.count("\n") == 1
    assert seen.err.startswith("lightning-qk: error: ")
    return seen.err


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
    assert "layer_00" in seen.out


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


def test_wrong_lines(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean '--json'" in refusal(capsys, llama, "--jsn", "x")
    assert "--help" in refusal(capsys)
    assert "expected a condition" in refusal(capsys, llama, "--fail-on", "qk/eig_var")
    assert "did you mean 'qk/eig_var/max'" in refusal(capsys, llama, "--fail-on", "qk/eig_vr/max>3")
    assert "one checkpoint" in refusal(capsys, llama, llama, "--html", tmp_path / "a.html")
    assert "name another" in refusal(capsys, llama, "--compare")
    assert "both" in refusal(capsys, llama, "--json", "-", "--csv", "-")
    assert not (tmp_path / "a.html").exists()


def test_wrong_places(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"did you mean {str(llama)!r}" in refusal(capsys, llama.with_name("lama"))
    assert "HF_HUB_OFFLINE" in refusal(capsys, "nobody/nothing")
    (tmp_path / "empty").mkdir()
    assert "holds nothing" in refusal(capsys, tmp_path / "empty")
    (tmp_path / "a.txt").write_text("text")
    assert "ends with" in refusal(capsys, tmp_path / "a.txt")
    (tmp_path / "bare").mkdir()
    shutil.copy(llama / "config.json", tmp_path / "bare")
    assert "expected weights in" in refusal(capsys, tmp_path / "bare")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "meta.pt").touch()
    assert "expected the index of a checkpoint in shards" in refusal(capsys, tmp_path / "sharded")


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / next(shard for key, shard in index.items() if name in key)


def test_damaged_weights(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = shard_of(llama, "layers.1.self_attn.q_proj")
    whole = shard.read_bytes()
    target = tmp_path / "out.json"
    for cut in (len(whole) // 2, 20, 0):
        shard.write_bytes(whole[:cut])
        said = refusal(capsys, llama, "--json", target)
        assert shard.name in said
        assert "cut short" in said
    shard.unlink()
    assert f"expected the shard {shard.name}" in refusal(capsys, llama, "--json", target)
    shard.write_bytes(whole)
    index = llama / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.1.self_attn.k_proj.weight"]
    index.write_text(json.dumps(content))
    assert "'model.layers.1.self_attn.k_proj.weight'" in refusal(capsys, llama, "--json", target)
    index.write_text("{")
    assert "weight_map" in refusal(capsys, llama, "--json", target)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "model_type": "llamma"}))
    assert "transformers" in refusal(capsys, llama, "--json", target)
    (llama / "config.json").write_text("{")
    assert "config.json" in refusal(capsys, llama, "--json", target)
    assert not target.exists()


def test_weights_of_another_shape_or_kind(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = llama / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_key_value_heads": 1}))
    assert "of shape (8, 32), got (16, 32)" in refusal(capsys, llama)
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq", "nbits": 4}}))
    assert "quantized (hqq)" in refusal(capsys, llama)
    path.write_text(json.dumps(config))
    models.gpt2().config.save_pretrained(llama)
    assert "weights of a GPT2Model" in refusal(capsys, llama)


class Thing:
    """Something that only this program knows."""


def test_checkpoints_that_can_run_code(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": {"thing": Thing()}}, path)
    said = refusal(capsys, path, "--config", llama)
    assert "--trust" in said
    assert "Thing" in said
    assert main(["inspect", str(path), "--config", str(llama), "--trust"]) == 0
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cut short" in refusal(capsys, path, "--config", llama)
    torch.save([1, 2], path)
    assert "holds no tensors" in refusal(capsys, path, "--config", llama)


def test_the_old_format_of_torch(llama: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    path = tmp_path / "old.pt"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    assert main(["inspect", str(path), "--config", str(llama)]) == 0


def test_targets_that_cannot_be_written(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "add a name" in refusal(capsys, llama, "--html", tmp_path)
    (tmp_path / "file").touch()
    assert "may be written" in refusal(capsys, llama, "--html", tmp_path / "file" / "a.html")

    def no_access(path: object, mode: int) -> bool:
        return mode != os.W_OK

    monkeypatch.setattr("lightning_qk.inspect.export.os.access", no_access)
    assert "may be written" in refusal(capsys, llama, "--json", tmp_path / "a.json")


def test_a_full_disk_leaves_what_was_there(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.json"
    target.write_text("before")

    def full(self: Path, text: str, **options: object) -> int:
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left" in refusal(capsys, llama, "--json", target)
    assert target.read_text() == "before"
    assert not list(tmp_path.glob(".*"))


def test_files_that_may_not_be_read(
    llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shard_of(llama, "q_proj")
    whole = Path.open

    def closed(self: Path, *args: object, **options: object) -> object:
        if self == shard:
            raise PermissionError(13, "Permission denied")
        return whole(self, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", closed)
    said = refusal(capsys, llama)
    assert shard.name in said
    assert "permissions" in said


def test_an_interrupted_run_writes_nothing(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = SimpleNamespace(count=0)
    load = reading_module._load

    def interrupt(*args: object) -> None:
        calls.count += 1
        if calls.count == 2:
            raise KeyboardInterrupt
        load(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(reading_module, "_load", interrupt)
    target = tmp_path / "a.json"
    assert main(["inspect", str(llama), "--json", str(target)]) == 130
    seen = capsys.readouterr()
    assert seen.err == "lightning-qk inspect: interrupted; nothing is written\n"
    assert not target.exists()
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_real_interrupt(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    code = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from lightning_qk.cli import main; from lightning_qk.inspect import read\n"
        "def slow(*args): Path('started').touch(); time.sleep(60)\n"
        "read._load = slow\n"
        f"sys.exit(main(['inspect', {str(llama)!r}, '--json', 'out/a.json', '--html', 'out/a.html']))"
    )
    program = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "started").exists() and program.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=60)
    finally:
        program.kill()
    assert program.returncode == 130
    assert said == "lightning-qk inspect: interrupted; nothing is written\n"
    assert not list((tmp_path / "out").iterdir())


def test_a_target_that_stopped_being_writable(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the checkpoint was read somebody made a folder of the name, or a file of the folder's."""
    read = command_module._read_all

    def meanwhile(options: argparse.Namespace) -> object:
        found = read(options)
        (tmp_path / "page.html").mkdir()
        (tmp_path / "new").write_text("a file")
        return found

    for option, name in (("--html", "page.html"), ("--json", "new/a.json"), ("--csv", "new/a.csv")):
        with monkeypatch.context() as patch:
            patch.setattr(command_module, "_read_all", meanwhile)
            assert "may be written" in refusal(capsys, llama, option, tmp_path / name)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "new", "page.html"]
        (tmp_path / "page.html").rmdir()
        (tmp_path / "new").unlink()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_folder_where_a_file_should_be(
    name: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (llama / name).unlink()
    (llama / name).mkdir()
    said = refusal(capsys, llama, "--json", tmp_path / "a.json")
    assert name in said or "config" in said
    assert not (tmp_path / "a.json").exists()


def test_a_shard_that_is_a_folder_or_a_dead_link(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = shard_of(llama, "q_proj")
    shard.unlink()
    shard.mkdir()
    assert shard.name in refusal(capsys, llama)
    shard.rmdir()
    shard.symlink_to(llama / "nowhere")
    assert shard.name in refusal(capsys, llama)


def test_the_wrong_folder(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.txt").write_text("text")
    assert "which holds train.txt: pass the folder that save_pretrained wrote" in refusal(capsys, data)
    assert "which holds train.txt" in refusal(capsys, data, "--series")


def test_models_without_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50, state_size=4)
    transformers.MambaModel(config).save_pretrained(tmp_path / "mamba")
    assert "which has none" in refusal(capsys, tmp_path / "mamba")


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "inspect" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("exit status", "--fail-on", "--moments-only", "examples:"))
    assert max(map(len, out.splitlines())) <= 120
