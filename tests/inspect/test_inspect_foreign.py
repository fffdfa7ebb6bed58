"""Files that are no plain state dict: whole modules, parts of sharded models, adapters, formats of others."""

from pathlib import Path

import models
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_inspect_read import check, read
from torch import Tensor, nn

from lightning_qk.inspect import Options
from lightning_qk.inspect.documents import BadInput


class Wrapper(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


@pytest.mark.parametrize("kind", ["module", "within another", "beside other things"])
def test_a_model_that_was_saved_whole_needs_trust(kind: str, tmp_path: Path) -> None:
    model = models.llama()
    saved = {
        "module": model,
        "within another": Wrapper(model),
        "beside other things": {"model": model, "epoch": 3},
    }
    torch.save(saved[kind], tmp_path / "whole.pt")
    with pytest.raises(BadInput, match=r"holds objects of .* pass --trust"):
        read(tmp_path / "whole.pt")
    check(read(tmp_path / "whole.pt", Options(trust=True)), model)


@pytest.fixture
def one_process() -> object:
    store = dist.HashStore()
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("whole", [True, False])
def test_a_part_of_a_sharded_model_is_refused(whole: bool, tmp_path: Path, one_process: object) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (1,))
    model = models.llama()
    model.config.save_pretrained(tmp_path)

    def sharded(value: Tensor) -> Tensor:
        local = value if whole else value[: len(value) // 2]
        return DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.stride()
        )

    torch.save({name: sharded(value) for name, value in model.state_dict().items()}, tmp_path / "a.pt")
    if whole:
        check(read(tmp_path / "a.pt"), model)
        return
    with pytest.raises(BadInput, match="full_state_dict=True"):
        read(tmp_path / "a.pt")


PROJECTION = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("form", ["folder", ".ckpt"])
@pytest.mark.parametrize(
    "name",
    [
        f"{PROJECTION}.lora_A",
        f"{PROJECTION}.lora_A.default.weight",
        f"{PROJECTION}.lora_a.weight",
        "model.layers.1.self_attn.lora_q.weight",
        f"{PROJECTION}.hada_w1_a",
        f"{PROJECTION}.base_layer.weight",
    ],
)
def test_adapters_that_are_not_merged_are_an_error(name: str, form: str, tmp_path: Path) -> None:
    model = models.llama()
    model.config.save_pretrained(tmp_path)
    tensors = {own: value.clone() for own, value in model.state_dict().items()}
    if "base_layer" in name:
        tensors[name] = tensors.pop(f"{PROJECTION}.weight")
    else:
        tensors[name] = torch.zeros(4, 32)
    if form == "folder":
        save_file(tensors, tmp_path / "model.safetensors")
        path = tmp_path
    else:
        torch.save(
            {"state_dict": {f"net.{own}": value for own, value in tensors.items()}},
            path := tmp_path / "a.ckpt",
        )
    with pytest.raises(BadInput, match="merge_and_unload") as raised:
        read(path)
    assert name in str(raised.value)


def test_flat_parameters_are_refused(tmp_path: Path) -> None:
    models.llama().config.save_pretrained(tmp_path)
    torch.save({"_fsdp_wrapped_module._flat_param": torch.zeros(9)}, tmp_path / "a.pt")
    with pytest.raises(BadInput, match="FULL_STATE_DICT"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("zero_to_fp32.py", "python zero_to_fp32.py"),
        ("checkpoint/mp_rank_00_model_states.pt", "convert_zero_checkpoint_to_fp32_state_dict"),
        ("tf_model.h5", "from_tf=True"),
        ("flax_model.msgpack", "from_flax=True"),
        ("consolidated.00.pth", "convert_llama_weights_to_hf.py"),
    ],
)
def test_formats_of_others_name_what_converts_them(
    file: str, said: str, with_config: bool, tmp_path: Path
) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    if with_config:
        models.llama().config.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="which holds") as raised:
        read(tmp_path)
    assert said in str(raised.value)


def test_what_converts_them_exists() -> None:
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    assert callable(convert_zero_checkpoint_to_fp32_state_dict)
    assert callable(get_model_state_dict)
    assert StateDictOptions(full_state_dict=True).full_state_dict
    assert callable(FullyShardedDataParallel.set_state_dict_type)
    assert StateDictType.FULL_STATE_DICT


def test_several_gguf_files_are_named(tmp_path: Path) -> None:
    for name in ("a-q4.gguf", "a-q8.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadInput, match=r"a-q4\.gguf, a-q8\.gguf"):
        read(tmp_path)
