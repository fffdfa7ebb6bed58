"""What the command says of bad input: wrong lines, damaged checkpoints, targets that cannot be written."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import torch
import transformers
from refused import refusal
from torch import nn

from lightning_qk.cli import inspect as command_module
from lightning_qk.cli import main
from lightning_qk.inspect import read as reading_module


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
