"""Weights that are kept as codes with scales are the numbers that the codes stand for, or are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from safetensors.torch import save_file
from test_inspect_read import check, read
from torch import Tensor, nn

from lightning_qk.inspect import codes
from lightning_qk.inspect.documents import BadInput
from lightning_qk.inspect.quantization import PLAIN, Quantization, quantization_of

Made = tuple[dict[str, Tensor], Tensor]
"""A module's tensors and the weight that they stand for."""

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ: the code that is at each place of a word


def words(values: list[int], bits: int) -> list[int]:
    """Codes as one long number, cut into words of 32 bits, the lowest first."""
    number = sum(value << bits * place for place, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    made = [number >> 32 * place & 0xFFFFFFFF for place in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in made]


def packed(values: Tensor, bits: int) -> Tensor:
    """Codes packed along the last dimension."""
    return torch.tensor([words(row, bits) for row in values.tolist()], dtype=torch.int32)


def gptq(
    outputs: int, inputs: int, *, bits: int = 4, size: int = 8, v2: bool = False, order: bool = False
) -> Made:
    groups = inputs // size
    code = torch.randint(0, 2**bits, (inputs, outputs))
    zero = torch.randint(1, 2**bits, (groups, outputs))
    scale = (0.01 + 0.01 * torch.rand(groups, outputs)).half()
    group = torch.arange(inputs) // size
    if order:
        group = group[torch.randperm(inputs)]
    weight = (code - zero[group]).double() * scale[group].double()
    tensors = {
        "qweight": packed(code.T, bits).T.contiguous(),
        "qzeros": packed(zero if v2 else zero - 1, bits),
        "scales": scale,
        "g_idx": group.int(),
    }
    return tensors, weight.T


def awq(outputs: int, inputs: int, *, size: int = 8) -> Made:
    groups = inputs // size
    code = torch.randint(0, 16, (inputs, outputs))
    zero = torch.randint(0, 16, (groups, outputs))
    scale = (0.01 + 0.01 * torch.rand(groups, outputs)).half()

    def ordered(values: Tensor) -> Tensor:
        return values.view(len(values), -1, 8)[:, :, AWQ_ORDER].reshape(len(values), -1)

    weight = (code - zero.repeat_interleave(size, 0)).double() * scale.double().repeat_interleave(size, 0)
    return {
        "qweight": packed(ordered(code), 4),
        "qzeros": packed(ordered(zero), 4),
        "scales": scale,
    }, weight.T


def pack_quantized(outputs: int, inputs: int, *, bits: int = 4, size: int = 8, zeros: bool = False) -> Made:
    groups = inputs // size
    half = 2 ** (bits - 1)
    code = torch.randint(-half, half, (outputs, inputs))
    zero = torch.randint(-half, half, (outputs, groups)) * int(zeros)
    scale = (0.01 + 0.01 * torch.rand(outputs, groups)).bfloat16()
    weight = (code - zero.repeat_interleave(size, 1)).double() * scale.double().repeat_interleave(size, 1)
    tensors = {
        "weight_packed": packed(code + half, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    if zeros:
        tensors["weight_zero_point"] = packed((zero + half).T, bits).T.contiguous()
    return tensors, weight


def fp8(
    outputs: int, inputs: int, *, name: str = "weight_scale_inv", block: tuple[int, int] | None = None
) -> Made:
    weight = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
    if block is None:
        scale = torch.tensor(0.37)
        whole = scale.expand(outputs, inputs)
    else:
        rows, columns = (-(-size // part) for size, part in zip((outputs, inputs), block, strict=True))
        scale = 0.1 + torch.rand(rows, columns)
        whole = torch.stack(
            [
                torch.stack([scale[row // block[0], column // block[1]] for column in range(inputs)])
                for row in range(outputs)
            ]
        )
    tensors = {"weight": weight, name: scale}
    if name == "weight_scale":
        tensors["input_scale"] = torch.tensor(3.0)
    return tensors, weight.double() * whole.double()


def int8(outputs: int, inputs: int) -> Made:
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    scale = 0.01 * torch.rand(outputs, 1).bfloat16()
    return {"weight": weight, "weight_scale": scale}, weight.double() * scale.double()


def bnb8(outputs: int, inputs: int) -> Made:
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    largest = torch.rand(outputs)
    tensors = {"weight": weight, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, weight.double() * largest.double()[:, None] / 127


def bnb4(outputs: int, inputs: int, *, nested: bool = False) -> Made:
    table = torch.linspace(-1, 1, 16).pow(3)
    code = torch.randint(0, 16, (outputs * inputs,))
    blocks = len(code) // 16
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": 16,
        "dtype": "bfloat16",
        "shape": [outputs, inputs],
    }
    tensors = {"weight": (code[::2] * 16 + code[1::2]).to(torch.uint8)[:, None], "weight.quant_map": table}
    if nested:
        outer = torch.linspace(-1, 1, 256)
        inner = torch.randint(0, 256, (blocks,))
        most = 0.2 * torch.rand(-(-blocks // 4))
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.7}
        tensors |= {"weight.nested_absmax": most, "weight.nested_quant_map": outer}
        tensors["weight.absmax"] = inner.to(torch.uint8)
        largest = outer.double()[inner] * most.double()[torch.arange(blocks) // 4] + 0.7
    else:
        tensors["weight.absmax"] = torch.rand(blocks)
        largest = tensors["weight.absmax"].double()
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors["weight.quant_state.bitsandbytes__nf4"] = text
    return tensors, (table.double()[code] * largest.repeat_interleave(16)).view(outputs, inputs)


def of_groups(**weights: object) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True, "sym": False}
KINDS: dict[str, tuple[Callable[[int, int], Made], dict[str, Any]]] = {
    "gptq": (gptq, GPTQ),
    "gptq, 3 bits, any order": (lambda m, n: gptq(m, n, bits=3, order=True), {**GPTQ, "bits": 3}),
    "gptq v2, 8 bits": (
        lambda m, n: gptq(m, n, bits=8, v2=True),
        {**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}),
    "pack-quantized": (pack_quantized, of_groups(num_bits=4, group_size=8, type="int", strategy="group")),
    "pack-quantized, asymmetric": (
        lambda m, n: pack_quantized(m, n, size=n, zeros=True),
        of_groups(num_bits=4, group_size=None, type="int", strategy="channel"),
    ),
    "int-quantized": (int8, of_groups(num_bits=8, type="int", strategy="channel")),
    "fp8 blocks": (
        lambda m, n: fp8(m, n, block=(12, 20)),
        {"quant_method": "fp8", "weight_block_size": [12, 20], "activation_scheme": "dynamic"},
    ),
    "fp8 tensor": (lambda m, n: fp8(m, n, name="weight_scale"), {"quant_method": "fp8"}),
    "fp8 rows": (
        lambda m, n: fp8(m, n, name="weight_scale", block=(1, n)),
        of_groups(num_bits=8, type="float", strategy="channel"),
    ),
    "bitsandbytes nf4": (bnb4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes nf4, nested": (lambda m, n: bnb4(m, n, nested=True), {"quant_method": "bitsandbytes"}),
    "bitsandbytes int8": (bnb8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


def write(folder: Path, kind: str, *, change: Callable[[dict[str, Tensor]], None] | None = None) -> nn.Module:
    """A folder whose linear maps are kept as codes; gives the model of the numbers that they stand for."""
    make, config = KINDS[kind]
    torch.manual_seed(1)
    model = models.llama().double()
    state = {name: value.float() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            tensors, weight = make(*module.weight.shape)
            del state[f"{name}.weight"]
            state |= {f"{name}.{own}": value for own, value in tensors.items()}
            module.weight.data = weight
    if change is not None:
        change(state)
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_spectra_are_those_of_the_numbers_that_codes_stand_for(kind: str, tmp_path: Path) -> None:
    model = write(tmp_path, kind)
    reading = read(tmp_path)
    check(reading, model, tolerance=1e-6)
    (note,) = reading.notes
    assert "codes stand for" in note


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_numbers(kind: str) -> None:
    make, config = KINDS[kind]
    quantization = quantization_of({"quantization_config": config}, "here")
    formula = {
        "gptq": codes.gptq,
        "awq": codes.awq,
        "pack-": codes.packed,
        "int-": codes.scaled,
        "fp8": codes.scaled,
        "bitsandbytes nf4": codes.four_bits,
        "bitsandbytes int8": codes.eight_bits,
    }
    own = next(one for start, one in reversed(formula.items()) if kind.startswith(start))
    for shape in ((64, 32), (32, 160)):
        tensors, weight = make(*shape)
        tensors.pop("input_scale", None)
        found = own(tensors, quantization)
        torch.testing.assert_close(found.double(), weight, rtol=1e-6, atol=1e-9)


def test_groups_without_a_list_are_in_order() -> None:
    tensors, weight = gptq(32, 64, size=16)
    del tensors["g_idx"]
    found = codes.gptq(tensors, Quantization("gptq", bits=4, group_size=16))
    torch.testing.assert_close(found.double(), weight)
    with pytest.raises(ValueError, match="groups"):
        codes.gptq(tensors, Quantization("gptq", bits=4, group_size=32))


QUERY = "model.layers.0.self_attn.q_proj."


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        del state[QUERY + name]

    return change


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({QUERY + name: value})


REFUSED = {
    "no scales": ("gptq", without("scales"), "lacks"),
    "another tensor": ("gptq", put("perm", torch.zeros(3)), "also holds .*perm"),
    "zero points that kernels disagree on": (
        "gptq",
        put("qzeros", torch.full((4, 4), -1).int()),
        "points of 0",
    ),
    "groups that do not exist": ("gptq", put("g_idx", torch.full((32,), 4).int()), "other groups"),
    "groups of other inputs": ("gptq", put("g_idx", torch.zeros(31).int()), "31"),
    "codes of another width": ("gptq", put("qzeros", torch.zeros(4, 2).int()), "another width"),
    "codes of another type": ("gptq", put("qweight", torch.zeros(4, 32)), "not a matrix of int32"),
    "a second scale": ("fp8 tensor", put("weight_scale_2", torch.ones(1)), "also holds .*weight_scale_2"),
    "scales of nothing": ("fp8 tensor", put("weight_scale", torch.ones(5, 1)), "5 scales"),
    "a scale beside plain numbers": ("fp8 tensor", put("weight", torch.ones(32, 32)), "scale beside"),
    "a shape of another weight": ("pack-quantized", put("weight_shape", torch.tensor([32, 10**12])), "codes"),
    "a state that is damaged": (
        "bitsandbytes nf4",
        put("weight.quant_state.bitsandbytes__nf4", torch.zeros(3).to(torch.uint8)),
        "form of bitsandbytes",
    ),
    "tiles": ("bitsandbytes int8", put("weight_format", torch.tensor(2, dtype=torch.uint8)), "tiled"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_whole_or_not_known_is_refused(case: str, tmp_path: Path) -> None:
    kind, change, said = REFUSED[case]
    write(tmp_path, kind, change=change)
    with pytest.raises(BadInput, match=said) as raised:
        read(tmp_path)
    assert "q_proj" in str(raised.value)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "hqq"},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}},
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
    ],
)
def test_other_methods_are_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=config["quant_method"]):
        quantization_of({"quantization_config": config}, "here")
    assert quantization_of({}, "here") == PLAIN


def test_codes_without_a_method_are_refused(tmp_path: Path) -> None:
    model = write(tmp_path, "gptq")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="of GPTQ or of AWQ"):
        read(tmp_path)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 8}))
    check(read(tmp_path), model, tolerance=1e-6)


def test_experts_in_mxfp4_are_not_touched(tmp_path: Path) -> None:
    """gpt-oss: attention is plain; a shard with nothing but experts need not be there."""
    config = transformers.GptOssConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        vocab_size=50,
    )
    model = transformers.GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "sinks" in name or name.endswith("bias"):
            nn.init.normal_(parameter)
    state = {name: value.bfloat16() for name, value in model.state_dict().items() if ".experts." not in name}
    model.load_state_dict(state, strict=False)
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    quantized = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantized}))
    save_file(state, tmp_path / "attention.safetensors")
    experts = [
        f"model.layers.{layer}.mlp.experts.{name}_proj_{part}"
        for layer in range(2)
        for name in ("gate_up", "down")
        for part in ("blocks", "scales", "bias")
    ]
    index = dict.fromkeys(state, "attention.safetensors") | dict.fromkeys(experts, "gone.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    check(read(tmp_path), model)


def test_libraries_own_files(tmp_path: Path) -> None:
    """compressed-tensors and bitsandbytes, where they are installed, decode to the same numbers."""
    pytest.importorskip("compressed_tensors")
    functional = pytest.importorskip("bitsandbytes.functional")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = torch.randn(64, 96)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    scale = weight.view(64, 3, 32).abs().amax(-1) / 7
    made = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    wanted = PackedQuantizationCompressor.decompress(made, scheme)["weight"]
    how = Quantization("compressed-tensors", bits=4, group_size=32)
    torch.testing.assert_close(codes.packed(made, how), wanted, rtol=0, atol=0)
    for kind in ("nf4", "fp4"):
        made, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
        parts = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
        found = codes.four_bits({"weight": made, **parts}, how)
        torch.testing.assert_close(found, functional.dequantize_4bit(made, state), rtol=1e-6, atol=1e-7)
