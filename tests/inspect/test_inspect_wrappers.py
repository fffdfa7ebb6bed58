"""Names with what compiling, sharding, checkpointing and modules around a network put into them."""

import itertools
from pathlib import Path

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_inspect_leftovers import two
from test_inspect_read import check, read
from torch import Tensor, nn

from lightning_qk.inspect import Options
from lightning_qk.inspect.read import Reading

INNER = ["_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_forward_module", "_checkpoint_wrapped_module"]
AROUND = st.lists(st.sampled_from([*INNER, "module", "model", "network"]), max_size=6)
WITHIN = st.lists(st.sampled_from([*INNER, "module"]), max_size=3)


def wrapped(name: str, around: list[str], within: dict[str, list[str]]) -> str:
    """A name with parts before it, and behind each of its modules."""
    parts = name.split(".")
    inside = [[part, *within.get(part, [])] for part in parts[:-1]]
    return ".".join([*around, *itertools.chain(*inside), parts[-1]])


def equal(found: Reading, wanted: Reading) -> None:
    assert found.names == wanted.names
    assert found.values.keys() == wanted.values.keys()
    for name, value in found.values.items():
        torch.testing.assert_close(value, wanted.values[name], rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def plain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, nn.Module, Reading]:
    folder = tmp_path_factory.mktemp(request.param)
    model = getattr(models, request.param)()
    model.save_pretrained(folder)
    return folder, model, read(folder, eigenvalues=False)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    around=AROUND,
    within=st.dictionaries(st.sampled_from(["model", "0", "1", "h", "self_attn", "attn", "q_proj"]), WITHIN),
    form=st.sampled_from(["folder", "file", ".ckpt", ".pt"]),
)
def test_any_nesting_of_wrappers_gives_the_same_spectra(
    plain: tuple[Path, nn.Module, Reading], around: list[str], within: dict[str, list[str]], form: str
) -> None:
    folder, model, wanted = plain
    tensors: dict[str, Tensor] = {
        wrapped(name, around, within): value.clone() for name, value in model.state_dict().items()
    }
    if form in ("folder", "file"):
        path = folder / "model.safetensors"
        save_file(tensors, path)
        path = folder if form == "folder" else path
    else:
        path = folder / f"a{form}"
        torch.save({"state_dict": tensors} if form == ".ckpt" else tensors, path)
    equal(read(path, eigenvalues=False), wanted)


def test_networks_that_differ_by_a_wrapper_alone_are_two(tmp_path: Path) -> None:
    own, other = models.llama(), models.llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    own.save_pretrained(tmp_path)
    save_file(two(own, other, ("", "module.")), tmp_path / "model.safetensors")
    reading = read(tmp_path)
    check(reading, own)
    (note,) = [note for note in reading.notes if "networks" in note]
    assert "--prefix module" in note
    check(read(tmp_path, Options(prefix="module")), other)


@pytest.mark.parametrize("prefix", ["teacher", "teacher.module", "teacher.module._orig_mod."])
def test_a_prefix_is_given_with_or_without_its_wrappers(prefix: str, tmp_path: Path) -> None:
    own, other = models.llama(), models.llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    own.save_pretrained(tmp_path)
    save_file(two(own, other, ("student.", "teacher.module._orig_mod.")), tmp_path / "model.safetensors")
    check(read(tmp_path), own)
    check(read(tmp_path, Options(prefix=prefix)), other)
