"""Damaged and hostile checkpoints: a table, or one sentence that names the file; nothing runs, little memory."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from damage import ESCAPE, change_one_value, status_of
from safetensors.torch import save_file
from test_inspect_adapter import adapted

from lightning_qk.cli import main


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of each kind."""
    root = tmp_path_factory.mktemp("valid")
    torch.manual_seed(0)
    adapted(models.llama(), root / "lora", target_modules=["q_proj"], alpha_pattern={"q_proj": 4})
    model = models.llama()
    model.save_pretrained(root / "whole")
    model.save_pretrained(root / "shards", max_shard_size="20KB")
    (root / "torch").mkdir()
    model.config.save_pretrained(root / "torch")
    torch.save(model.state_dict(), root / "torch" / "pytorch_model.bin")
    (root / "lightning").mkdir()
    hyper = {"model": {**model.config.to_dict()}}
    torch.save(
        {"state_dict": model.state_dict(), "global_step": 3, "hyper_parameters": hyper},
        root / "lightning" / "last.ckpt",
    )
    (root / "old").mkdir()
    model.config.save_pretrained(root / "old")
    torch.save(model.state_dict(), root / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return root


def run(capsys: pytest.CaptureFixture[str], target: Path) -> int:
    """Inspect; check what must hold of any file."""
    return status_of(capsys, ["inspect", "--moments-only", str(target)], target.name)


def edited_json(path: Path, source: random.Random) -> None:
    """One field of a JSON file, on any level, becomes something else."""
    fields = json.loads(path.read_text())
    change_one_value(fields, source)
    path.write_text(json.dumps(fields))


def damaged_bytes(path: Path, source: random.Random) -> None:
    data = bytearray(path.read_bytes())
    kind = source.randrange(6)
    if kind == 0:
        data = data[: source.randrange(len(data))]
    elif kind == 1:
        for _ in range(source.choice([1, 8, 64])):
            data[source.randrange(len(data))] = source.randrange(256)
    elif kind == 2:
        start = source.randrange(len(data))
        data[start : start + 200] = source.randbytes(source.randrange(400))
    elif kind == 3:
        for _ in range(8):  # where headers are
            data[source.randrange(min(64, len(data)))] = source.randrange(256)
    elif kind == 4:
        data = bytearray(
            source.choice(
                [b"", b"\xef\xbb\xbf{}", b"\xff\xfe", b"[" * 10**5, b"null", b"PK\x03\x04", b"\x80\x02."]
            )
        )
    else:
        data = bytearray(source.randbytes(len(data)))
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("kind", ["whole", "shards", "torch", "old", "lightning", "lora"])
@pytest.mark.parametrize("how", ["json", "bytes"])
def test_mutations_of_valid_checkpoints(
    kind: str, how: str, valid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = random.Random(f"{kind} {how}")
    origin = valid / kind
    statuses = []
    for place in range(20):
        folder = tmp_path / f"case_{place}"
        shutil.copytree(origin, folder)
        target = folder / "adapter" if kind == "lora" else folder
        files = sorted(
            file for file in target.iterdir() if not file.name.startswith(("README", "generation"))
        )
        suffix = (".json",) if how == "json" else (".safetensors", ".bin", ".ckpt", ".json")
        choice = [file for file in files if file.suffix in suffix and "tokenizer" not in file.name]
        if not choice:
            pytest.skip("it has no JSON file")
        (edited_json if how == "json" else damaged_bytes)(source.choice(choice), source)
        statuses.append(run(capsys, target))
        shutil.rmtree(folder)
    assert 2 in statuses


class Payload:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (os.environ["LIGHTNING_QK_MARK"],)


def zip_of(path: Path, entries: dict[str, bytes], compression: int) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)


def bomb(path: Path) -> None:
    zip_of(
        path, {"data.pkl": b"\x80\x02}.", "data/0": b"\0" * 2**26, "version": b"3\n"}, zipfile.ZIP_DEFLATED
    )


def bytes_bomb(path: Path) -> None:
    data = b"\x80\x02cbuiltins\nbytearray\n" + b"J" + (2**31 - 2).to_bytes(4, "little") + b"\x85R."
    zip_of(path, {"data.pkl": data, "version": b"3\n"}, zipfile.ZIP_STORED)


def payload(path: Path) -> None:
    with path.open("wb") as file:
        pickle.dump({"state_dict": {"weight": Payload()}}, file, protocol=2)


def zipped_payload(path: Path) -> None:
    torch.save({"state_dict": {"weight": Payload()}}, path)


def huge_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + b"{")


def overlapping(path: Path) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"model.a": entry, "model.b": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)


def lying(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)


FILES = {
    "bomb": ("pytorch_model.bin", bomb),
    "bytearray": ("pytorch_model.bin", bytes_bomb),
    "payload": ("pytorch_model.bin", payload),
    "zipped payload": ("pytorch_model.bin", zipped_payload),
    "huge header": ("model.safetensors", huge_header),
    "overlapping": ("model.safetensors", overlapping),
    "lying": ("model.safetensors", lying),
    "a folder": ("model.safetensors", lambda path: path.mkdir()),
    "itself": (
        "model.safetensors.index.json",
        lambda path: path.write_text(json.dumps({"weight_map": {"a": path.name}})),
    ),
    "outside": (
        "model.safetensors.index.json",
        lambda path: path.write_text(json.dumps({"weight_map": {"a": "../x.safetensors", "b": ".."}})),
    ),
}

CHILD = """
import resource, sys, time
from lightning_qk.cli import main
import lightning_qk.inspect.read, lightning_qk.inspect.export, transformers, resource
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 700 * 2**20,) * 2)
from transformers import AutoConfig, LlamaForCausalLM
for target in sys.argv[1:]:
    before = time.perf_counter()
    status = main(["inspect", "--moments-only", target])
    seconds = time.perf_counter() - before
    print(f"{seconds:.1f} {target}")
    assert status == 2 and seconds < 20, (target, status)
"""
CONFIGS = [
    {"num_hidden_layers": 10**6},
    {"num_hidden_layers": 900},
    {"head_dim": 10**9},
    {"hidden_size": 10**9},
    {"intermediate_size": 10**12},
    {"num_attention_heads": 10**8},
    {"vocab_size": 10**11},
    {"model_type": "distilbert", "architectures": ["DistilBertModel"], "sinusoidal_pos_embds": True, "max_position_embeddings": 10**9},  # noqa: E501
    {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 10**9},
]  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
def test_little_memory_is_taken_and_nothing_runs(valid: Path, tmp_path: Path) -> None:
    targets = []
    for name, (file, write) in FILES.items():
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(valid / "whole" / "config.json", folder)
        os.environ["LIGHTNING_QK_MARK"] = str(tmp_path / "ran")
        write(folder / file)
        targets.append(folder)
    for place, change in enumerate(CONFIGS):
        folder = tmp_path / f"config_{place}"
        shutil.copytree(valid / "whole", folder)
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, **change}))
        targets.append(folder)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, targets)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "--traceback shows" not in done.stderr, done.stderr
    assert done.stderr.count("\n") == len(targets), done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_compressed_checkpoint_can_be_saved_again(
    valid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The remedy: torch reads it."""
    shutil.copytree(valid / "torch", tmp_path / "model")
    path = tmp_path / "model" / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    path.unlink()
    zip_of(path, entries, zipfile.ZIP_DEFLATED)
    assert run(capsys, tmp_path / "model") == 2
    torch.save(torch.load(path, weights_only=True), path)
    assert run(capsys, tmp_path / "model") == 0


def test_a_pattern_that_runs_for_years(
    valid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(valid / "lora", tmp_path / "lora")
    path = tmp_path / "lora" / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for pattern in ("(([a-z_.0-9]+)+)+X", "(", "[a-z]{1,5}" * 200):
        path.write_text(json.dumps({**config, "alpha_pattern": {pattern: 2}}))
        assert run(capsys, tmp_path / "lora" / "adapter") == 2


def test_names_in_files_do_not_reach_the_terminal_or_a_formula(
    valid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(f"=1+1 {ESCAPE}".replace("/", ""))
    shutil.copytree(valid / "whole", folder)
    state = models.llama().state_dict()
    extra = {f"model.layers.0.self_attn.{ESCAPE}.weight": torch.ones(2)}
    save_file({**state, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
    assert run(capsys, folder) == 0
    assert main(["inspect", str(folder), "--csv", "out.csv", "--html", "out.html", "--moments-only"]) == 0
    out = capsys.readouterr().out
    assert "[red]" in out
    assert "\x1b" not in out
    rows = Path("out.csv").read_text().splitlines()[1:]
    assert rows
    assert all(row.lstrip('"').startswith("'=1+1") and "\x1b" not in row for row in rows)
    assert "not verified: weights only" in Path("out.html").read_text()


def test_the_table_says_that_nothing_was_run(valid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--moments-only", str(valid / "whole")]) == 0
    assert capsys.readouterr().out.count("not verified: weights only") == 1
    assert main(["inspect", "--moments-only", str(valid / "whole"), "--json", "-"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert only["verification"] == "not verified: weights only"
