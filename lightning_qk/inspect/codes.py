"""Numbers that codes with scales stand for, as GPTQ, AWQ, compressed-tensors, bitsandbytes and fp8 keep weights.

Each function is given a module's tensors by name and gives its weight, ``(outputs, inputs)`` in float32: the exact
product of code and scale, which kernels round to half precision. What a formula does not cover raises ValueError.
"""

import json
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_qk.inspect.quantization import Quantization

Parts = Mapping[str, Tensor]

_WORD = 32
_WIDTHS = (2, 3, 4, 8)
# Which place of a word holds the n-th code (AutoAWQ, ``AWQ_REVERSE_ORDER``): even ones come first.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_FLOAT8 = frozenset(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
    if hasattr(torch, name)
)
_E8M0 = getattr(torch, "float8_e8m0fnu", None)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes that are packed along the first dimension, lowest bits first, without gaps.

    Args:
        words: int32, ``(words, n)``.
        bits: of a code, eight at most.
        count: codes along that dimension.

    Returns:
        uint8, ``(count, n)``.

    Raises:
        ValueError: there are too few words.
    """
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(f"its codes are {_kind(words)}, not a matrix of int32")
    if -(-count * bits // _WORD) != len(words):
        raise ValueError(f"{count} codes of {bits} bits do not fill {len(words)} words")
    # So many words hold 32 codes.
    words = torch.nn.functional.pad(words, (0, 0, 0, -len(words) % bits))
    made = torch.empty(len(words) // bits, _WORD, words.shape[1], dtype=torch.uint8)
    for place in range(_WORD):
        word, shift = divmod(place * bits, _WORD)
        kept = min(bits, _WORD - shift)
        codes = (words[word::bits] >> shift) & ((1 << kept) - 1)
        if kept < bits:  # the rest is in the next word
            codes |= (words[word + 1 :: bits] & ((1 << bits - kept) - 1)) << kept
        made[:, place] = codes
    return made.view(-1, words.shape[1])[:count]


def gptq(parts: Parts, quantization: Quantization) -> Tensor:
    """GPTQ: ``(code - zero) scale``, with scale and zero of the group of each input.

    Its first format keeps zeros less one, which its kernels add again; the second (``gptq_v2``) as they are.
    """
    words, scales, zero_words = parts["qweight"], parts["scales"], parts["qzeros"]
    bits = _width(zero_words.shape, scales.shape, quantization)
    groups, outputs = scales.shape
    inputs = len(words) * _WORD // bits
    zeros = unpack(zero_words.T.contiguous(), bits, outputs).T
    if quantization.zeros_less_one:
        # Kernels disagree on these: some carry into the next code.
        if bool((zeros == 2**bits - 1).any()):
            raise ValueError("it has zero points of 0 in the first format, which kernels read differently")
        zeros = zeros + 1
    group = parts.get("g_idx")
    if group is None:
        group = torch.arange(inputs) // _group_size(inputs, groups, quantization)
    if group.shape != (inputs,) or group.is_floating_point():
        raise ValueError(f"it has groups of {_kind(group)} for {inputs} inputs")
    group = group.long()
    if inputs and not 0 <= int(group.min()) <= int(group.max()) < groups:
        raise ValueError(f"its inputs are in other groups than the {groups} that have scales")
    return _scaled(unpack(words, bits, inputs), zeros, _numbers(scales), group)


def awq(parts: Parts, quantization: Quantization) -> Tensor:
    """AWQ in AutoAWQ's ``gemm`` layout: ``(code - zero) scale``, outputs packed, eight in a word out of order."""
    words, scales, zero_words = parts["qweight"], parts["scales"], parts["qzeros"]
    if _width(zero_words.shape, scales.shape, quantization) != 4:
        raise ValueError("its codes do not have 4 bits")
    groups, outputs = scales.shape
    inputs = len(words)
    group = torch.arange(inputs) // _group_size(inputs, groups, quantization)

    def ordered(packed: Tensor) -> Tensor:
        codes = unpack(packed.T.contiguous(), 4, outputs).T
        return codes.reshape(len(codes), -1, 8)[:, :, list(_AWQ_PLACES)].reshape(len(codes), -1)

    return _scaled(ordered(words), ordered(zero_words), _numbers(scales), group)


def packed(parts: Parts, quantization: Quantization) -> Tensor:
    """compressed-tensors' ``pack-quantized``: signed codes, each input's group with a scale (and a zero)."""
    words, scales = parts["weight_packed"], parts["weight_scale"]
    bits = quantization.bits
    if bits is None or not 1 <= bits <= 8:
        raise ValueError("its configuration does not say of how many bits its codes are")
    shape = [int(size) for size in parts["weight_shape"].tolist()]
    if len(shape) != 2 or words.dim() != 2 or shape[0] != len(words) or scales.dim() != 2:
        raise ValueError(f"it has codes of {_kind(words)} and scales of {_kind(scales)} for a weight {shape}")
    outputs, inputs = shape
    codes = unpack(words.T.contiguous(), bits, inputs).short() - 2 ** (bits - 1)
    groups = scales.shape[1]
    group = parts.get("weight_g_idx")
    if group is None or bool((group == -1).all()):
        group = torch.arange(inputs) // _group_size(inputs, groups, quantization)
    group = group.long()
    if group.shape != (inputs,) or not 0 <= int(group.min()) <= int(group.max()) < groups:
        raise ValueError(f"its inputs are in other groups than the {groups} that have scales")
    zeros = torch.zeros(groups, outputs, dtype=torch.int16)
    zero_words = parts.get("weight_zero_point")
    if zero_words is not None:
        zeros = unpack(zero_words, bits, outputs).T.short() - 2 ** (bits - 1)
    return _scaled(codes, zeros, _numbers(scales).T, group)


def scaled(parts: Parts, quantization: Quantization) -> Tensor:
    """Numbers of eight bits times a scale: of the tensor, of each output, or of each block of the weight."""
    name = next(name for name in parts if name.startswith("weight_scale"))
    weight, scales = parts["weight"], parts[name]
    if weight.dim() != 2 or not (weight.dtype in _FLOAT8 or weight.dtype == torch.int8):
        raise ValueError(f"it has a scale beside a weight of {_kind(weight)}")
    if weight.dtype == torch.int8 and quantization.method != "compressed-tensors":
        raise ValueError("nothing says how its scale belongs to codes of int8")
    if scales.dtype in (torch.uint8, _E8M0):
        scales = torch.exp2(scales.view(torch.uint8).float() - 127)  # exponents alone
    scales = _numbers(scales)
    if scales.numel() == 1:
        scales = scales.reshape(1, 1)
    elif scales.dim() == 1 and len(scales) == len(weight):
        scales = scales[:, None]
    if scales.dim() != 2:
        raise ValueError(f"it has scales of {_kind(scales)} for a weight of {_kind(weight)}")
    blocks = [
        _block(size, count, block)
        for size, count, block in zip(weight.shape, scales.shape, quantization.blocks, strict=True)
    ]
    zeros = parts.get("weight_zero_point")
    numbers = weight.float()
    if zeros is not None:
        zeros = zeros.reshape(scales.shape) if zeros.numel() == scales.numel() else zeros
        if zeros.shape != scales.shape:
            raise ValueError(f"it has zero points of {_kind(zeros)} for scales of {_kind(scales)}")
        numbers -= _spread(zeros.float(), blocks, weight.shape)
    numbers *= _spread(scales, blocks, weight.shape)
    return numbers


def four_bits(parts: Parts, quantization: Quantization) -> Tensor:
    """bitsandbytes' ``nf4`` and ``fp4``: an entry of a table times the largest magnitude of its block.

    Magnitudes may be codes themselves, of the difference from their mean.
    """
    name = next(name for name in parts if name.startswith("weight.quant_state."))
    state = json.loads(bytes(parts[name].to(torch.uint8).tolist()))
    if not isinstance(state, dict):
        raise ValueError("its quant_state is no JSON object")
    shape, block = [int(size) for size in state["shape"]], int(state["blocksize"])
    words, table = parts["weight"].flatten(), parts["weight.quant_map"]
    count = math.prod(shape)
    if min(shape, default=0) <= 0 or block <= 0 or words.dtype != torch.uint8 or len(table) != 16:
        raise ValueError("its quant_state is damaged")
    if -(-count // 2) != len(words):
        raise ValueError(f"{len(words)} bytes do not hold a weight {shape}")
    largest = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        outer = int(state["nested_blocksize"])
        if outer <= 0 or len(parts["weight.nested_quant_map"]) != 256 or largest.dtype != torch.uint8:
            raise ValueError("its quant_state is damaged")
        entries = _numbers(parts["weight.nested_quant_map"])[largest.long()]
        largest = _repeated(_numbers(parts["weight.nested_absmax"]), outer, len(entries)) * entries
        largest = largest + float(state["nested_offset"])
    codes = torch.stack([words >> 4, words & 15], dim=-1).flatten()[:count]
    made = _numbers(table)[codes.int()]
    return (made * _repeated(_numbers(largest), block, count)).view(shape)


def eight_bits(parts: Parts, quantization: Quantization) -> Tensor:
    """bitsandbytes' int8: the code's share of 127, times the largest magnitude of its output."""
    weight, largest = parts["weight"], _numbers(parts["SCB"])
    layout = parts.get("weight_format")
    if layout is not None and int(layout) != 0:
        raise ValueError("its codes are tiled for one kind of GPU")
    if weight.dtype != torch.int8 or weight.dim() != 2 or largest.shape != (len(weight),):
        raise ValueError(f"it has scales of {_kind(largest)} for a weight of {_kind(weight)}")
    return weight.float() * (largest / 127)[:, None]


def _scaled(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """``(code - zero) scale`` of codes ``(inputs, outputs)``, as ``(outputs, inputs)``."""
    if zeros.shape != scales.shape or codes.shape[1] != scales.shape[1]:
        raise ValueError(
            f"it has codes of {_kind(codes)}, zero points of {_kind(zeros)} and scales of {_kind(scales)}"
        )
    numbers = codes.float()
    numbers -= zeros.float()[group]
    numbers *= scales[group]
    return numbers.T


def word_shape(shapes: Mapping[str, tuple[int, ...]], quantization: Quantization) -> tuple[int, ...]:
    """The shape of a weight of GPTQ's or AWQ's, by those of its parts."""
    words, scales = shapes["qweight"], shapes["scales"]
    bits = _width(shapes["qzeros"], scales, quantization)
    return scales[1], words[0] if quantization.method == "awq" else words[0] * _WORD // bits


def _width(zero_words: Sequence[int], scales: Sequence[int], quantization: Quantization) -> int:
    """Bits of a code, which follow from how many words hold the zero points of all outputs."""
    if len(scales) != 2 or len(zero_words) != 2 or zero_words[0] != scales[0] or 0 in scales:
        raise ValueError(f"it has zero points {tuple(zero_words)} and scales {tuple(scales)}")
    fitting = [bits for bits in _WIDTHS if -(-scales[1] * bits // _WORD) == zero_words[1]]
    if quantization.bits is not None and not quantization.differs:
        fitting = [bits for bits in fitting if bits == quantization.bits]
    if len(fitting) != 1:
        raise ValueError("its codes are of another width than its configuration says")
    return fitting[0]


def _group_size(inputs: int, groups: int, quantization: Quantization) -> int:
    """Inputs that share a scale."""
    size = -(-inputs // max(groups, 1))
    said = quantization.group_size
    if said is not None and said > 0 and not quantization.differs and groups > 1:
        size = said
    if groups < 1 or -(-inputs // max(size, 1)) != groups:
        raise ValueError(f"{groups} groups of {size} do not make its {inputs} inputs")
    if size * groups != inputs and said is None:
        raise ValueError(f"nothing says how its {inputs} inputs are in {groups} groups")
    return size


def _block(size: int, count: int, block: int | None) -> int:
    """Rows (or columns) of a weight that share a scale."""
    if count == 1:
        return max(size, 1)
    if block is not None and -(-size // block) == count:
        return block
    if count < 1 or size % count:
        raise ValueError(f"nothing says how {count} scales belong to {size} rows or columns")
    return size // count


def _spread(values: Tensor, blocks: list[int], shape: torch.Size) -> Tensor:
    """One value a block as one value a row and column; a dimension with a single one stays."""
    for dim, (block, size) in enumerate(zip(blocks, shape, strict=True)):
        if values.shape[dim] > 1 and block > 1:
            values = values.repeat_interleave(block, dim).narrow(dim, 0, size)
    return values


def _repeated(values: Tensor, times: int, count: int) -> Tensor:
    if -(-count // times) != len(values):
        raise ValueError(f"{len(values)} scales of {times} do not make {count} numbers")
    return values.repeat_interleave(times)[:count]


def _numbers(value: Tensor) -> Tensor:
    if not value.is_floating_point() or value.element_size() < 2:
        raise ValueError(f"its scales are {_kind(value)}")
    return value.float()


def _kind(value: Tensor) -> str:
    return f"{tuple(value.shape)} as {str(value.dtype).removeprefix('torch.')}"
