"""Quantization settings of a configuration, and which of them are supported."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_qk.inspect.documents import BadInput
from lightning_qk.inspect.foreign import instead_of

_FIELDS = ("quantization_config", "compression_config")
# Methods whose layers are read, or that leave some layers plain, which are.
_READ = frozenset(
    ["gptq", "awq", "fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "bitsandbytes", "mxfp4"]
)
_GPTQ_FORMATS = {"gptq": True, "gptq_v2": False}


@dataclass(frozen=True)
class Quantization:
    """How weights are quantized.

    Attributes:
        method: ``quant_method``, or empty where nothing says so.
        bits: of a code, None where that is not said or differs.
        group_size: inputs that share a scale, −1 for all; None where that is not said.
        zeros_less_one: whether zero points are kept less one.
        blocks: rows and columns that share a scale, where that is said.
        differs: whether bits and groups differ between modules.
    """

    method: str = ""
    bits: int | None = None
    group_size: int | None = None
    zeros_less_one: bool = True
    blocks: tuple[int | None, int | None] = (None, None)
    differs: bool = False


PLAIN = Quantization()


def quantization_of(config: Any, where: str) -> Quantization:
    """How a configuration says that weights are quantized.

    Args:
        config: plain data, or an object of transformers'.
        where: what to call it in messages.

    Raises:
        BadInput: in a way that is not read.
    """
    given = _given(config)
    if not given:
        return PLAIN
    method = str(getattr(given.get("quant_method"), "value", given.get("quant_method")) or "").lower()
    if method not in _READ:
        raise _refused(method or "a method without a name", where)
    fields = [given]
    if method == "gptq":
        layout = str(given.get("checkpoint_format") or given.get("format") or "gptq")
        if layout not in _GPTQ_FORMATS:
            raise _refused(f"gptq in the format {layout}", where)
    elif method == "awq":
        layout = str(getattr(given.get("version"), "value", given.get("version")) or "gemm").lower()
        backend = str(getattr(given.get("backend"), "value", given.get("backend")) or "autoawq").lower()
        if layout not in ("gemm", "ipex") or backend == "llm-awq":
            raise _refused(f"awq in the layout {layout} of {backend}", where)
    elif method == "compressed-tensors":
        if given.get("transform_config"):
            raise _refused("compressed-tensors with rotations", where)
        sparsity = given.get("sparsity_config")
        sparse = sparsity.get("format") if isinstance(sparsity, Mapping) else None
        if sparse not in (None, "dense"):
            raise _refused(f"compressed-tensors in the form {sparse}", where)
        groups = given.get("config_groups")
        fields = [
            group["weights"]
            for group in (groups.values() if isinstance(groups, Mapping) else ())
            if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
        ]
    bits = {_whole(one.get("bits", one.get("num_bits"))) for one in fields}
    sizes = {_whole(one.get("group_size")) for one in fields}
    blocks = {_pair(one.get("weight_block_size", one.get("block_structure"))) for one in fields}
    return Quantization(
        method,
        bits=bits.pop() if len(bits) == 1 else None,
        group_size=sizes.pop() if len(sizes) == 1 else None,
        zeros_less_one=_GPTQ_FORMATS.get(
            str(given.get("checkpoint_format") or given.get("format") or "gptq"), True
        ),
        blocks=blocks.pop() if len(blocks) == 1 else (None, None),
        differs=bool(given.get("dynamic")),
    )


def _given(config: Any) -> Mapping[str, Any]:
    for name in _FIELDS:
        found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if found is None:
            inner = config.get("text_config") if isinstance(config, Mapping) else None
            found = inner.get(name) if isinstance(inner, Mapping) else None
        if found is not None and not isinstance(found, Mapping):
            found = found.to_dict() if hasattr(found, "to_dict") else {"quant_method": str(found)}
        if found:
            return dict(found)
    return {}


def _refused(how: str, where: str) -> BadInput:
    return BadInput(
        f"expected weights whose numbers can be read, got {where}, which is quantized ({how}): {instead_of(how)}"
    )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _pair(value: Any) -> tuple[int | None, int | None]:
    if isinstance(value, list | tuple) and len(value) == 2:
        pair = (_whole(value[0]), _whole(value[1]))
        if all(one is not None and one > 0 for one in pair):
            return pair
    return None, None
