"""One model in every form that is opened has the spectra of its safetensors."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import run_script
from safetensors.torch import save_file
from test_inspect_gguf import llama, write
from test_inspect_read import read
from torch import nn

from lightning_qk.inspect import Options
from lightning_qk.inspect.read import Reading

pytestmark = pytest.mark.filterwarnings("ignore")


def same(found: Reading, wanted: Reading) -> None:
    assert found.labels == wanted.labels
    assert found.values.keys() == wanted.values.keys()
    for name, value in wanted.values.items():
        torch.testing.assert_close(found.values[name], value, rtol=1e-6, atol=1e-6, equal_nan=True)
    for label, value in wanted.eigenvalues.items():
        torch.testing.assert_close(found.eigenvalues[label].abs(), value.abs(), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    return llama()


@pytest.fixture(scope="module")
def plain(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    model.save_pretrained(folder)
    return folder


def test_two_processes_of_fsdp2(model: nn.Module, plain: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("fsdp2_checkpoint.py")
    run_script(script, plain, tmp_path / "shards", processes=2)
    assert len(list((tmp_path / "shards").glob("*.distcp"))) == 2
    same(read(tmp_path / "shards", Options(config=str(plain))), read(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["shards", "shards, wrapped", "folder, wrapped", ".ckpt, wrapped"])
def test_shards_and_wrappers(
    form: str, dtype: torch.dtype, model: nn.Module, plain: Path, tmp_path: Path
) -> None:
    state = {name: value.to(dtype) for name, value in model.state_dict().items()}
    model.config.save_pretrained(tmp_path)
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "model.safetensors")
    wanted = read(tmp_path)
    if "wrapped" in form:
        state = {f"module._orig_mod.{name}": value.clone() for name, value in state.items()}
    if form.startswith("shards"):
        target = tmp_path / "shards"
        dcp.save({"model": state}, checkpoint_id=target, no_dist=True)
    elif form.startswith("folder"):
        target = tmp_path
        save_file(state, tmp_path / "model.safetensors")
    else:
        target = tmp_path / "a.ckpt"
        torch.save({"state_dict": state}, target)
    same(read(target, Options(config=str(plain))), wanted)


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "Q8_0"])
def test_gguf_has_the_spectra_of_its_dequantized_weights(
    kind: str, model: nn.Module, plain: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    dequantized = write(tmp_path / "toy.gguf", model, kind)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert dequantized.keys() < state.keys()
    model.config.save_pretrained(tmp_path)
    save_file(
        {**state, **{n: v.contiguous() for n, v in dequantized.items()}}, tmp_path / "model.safetensors"
    )
    same(read(tmp_path / "toy.gguf"), read(tmp_path))
