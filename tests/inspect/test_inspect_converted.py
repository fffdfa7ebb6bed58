"""What a refusal names converts the format: the commands and lines of docs/how-to/read-a-checkpoint.md, on a toy.

Left out where the libraries are not installed: pip install compressed-tensors torchao hqq.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from pages import blocks, commands
from safetensors.torch import load_file
from test_inspect_read import read

from lightning_qk.inspect.documents import BadInput

pytestmark = pytest.mark.slow
PAGE = "docs/how-to/read-a-checkpoint.md"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=128,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained("base")
    return tmp_path / "base"


def check_converted(base: Path, within: float) -> None:
    """OUT is read, and its projections are those of the model, as near as a code is."""
    assert len(read(base.with_name("OUT")).labels) == 2
    original, found = load_file(base / "model.safetensors"), load_file("OUT/model.safetensors")
    for name in (name for name in original if name.endswith("_proj.weight")):
        whole, other = original[name].float(), found[name].float()
        assert (whole - other).norm() / whole.norm() < within, name


def lines(library: str) -> str:
    return next(code for code in blocks(PAGE, "text") if library in code)


def test_compressed_tensors_of_nvfp4(base: Path) -> None:
    pytest.importorskip("compressed_tensors.entrypoints.convert")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    )
    for layer in model.modules():
        if hasattr(layer, "weight_global_scale"):
            weight = layer.weight.data.float()
            whole = 448 * 6 / weight.abs().max()
            layer.weight_global_scale.data = whole.reshape(1).to(layer.weight_global_scale.dtype)
            groups = weight.reshape(weight.shape[0], -1, 16).abs().amax(-1) / 6 * whole
            layer.weight_scale.data = groups.to(layer.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained("FOLDER")
    compressor.update_config("FOLDER")

    with pytest.raises(BadInput, match="form of compressed-tensors") as refused:
        read(Path("FOLDER").resolve())
    command = re.search(r"run `(.*?)`", str(refused.value))[1]
    assert command in commands(PAGE)
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    check_converted(base, 0.15)


def test_torchao(base: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    how = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=how, dtype=torch.bfloat16
    )
    model.save_pretrained("FOLDER")

    with pytest.raises(BadInput, match=r"quantized \(torchao\).* with the lines for torchao in " + PAGE):
        read(Path("FOLDER").resolve())
    exec(lines("hf_quantizer"), {})
    check_converted(base, 0.02)


def test_hqq(base: Path) -> None:
    hqq = pytest.importorskip("hqq.models.hf.base").AutoHQQHFModel
    from hqq.core.quantize import BaseQuantizeConfig

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    hqq.quantize_model(
        model,
        quant_config=BaseQuantizeConfig(nbits=4, group_size=16),
        compute_dtype=torch.bfloat16,
        device="cpu",
    )
    hqq.save_quantized(model, "FOLDER")

    with pytest.raises(BadInput, match="quantized by HQQ.* with the lines for HQQ in " + PAGE):
        read(Path("FOLDER").resolve())
    exec(lines("AutoHQQHFModel"), {})
    check_converted(base, 0.15)
