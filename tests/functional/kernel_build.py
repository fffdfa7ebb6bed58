"""Builds the kernels for an H100, down to machine code: compiling needs no GPU. Run by test_kernel.py."""

import warnings

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_qk.functional import _triton

FLAGS = {
    "CAUSAL": True,
    "WINDOW": False,
    "SOFTCAP": False,
    "BIAS": False,
    "MASK": 0,
    "SINKS": False,
    "INDEX": False,
    "PREFIX": True,
    "EVERY": True,
    "JOINT": True,
    "PRECISION": "tf32",
    "D": 64,
    "BLOCK_D": 64,
    "BLOCK_M": 64,
    "BLOCK_N": 64,
}
NUMBERS = {"scale": "fp32", "cap": "fp32", "masked_below": "fp32"}
POINTERS = ("prefix", "sinks", "values", "state", "out")


def build(kernel, dtype: str = "bf16", **flags) -> None:
    flags = {**FLAGS, **flags}
    pointers = dict.fromkeys(POINTERS, "*fp32") | dict.fromkeys(("query", "key", "bias"), "*" + dtype)
    pointers["used"] = "*u8"
    pointers["index"] = "*i64"
    pointers["mask"] = {0: "*" + dtype, 1: "*u8", 2: "*fp32"}[flags["MASK"]]
    constants = {name: flags[name] for name in kernel.arg_names if name in flags}
    constants |= {name: 1 for name in kernel.arg_names if name in ("query_d", "key_d", "stride_d", "bias_m")}
    types = {name: (pointers | NUMBERS).get(name, "i32") for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    # Addresses are multiples of 16 bytes.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if types[name].startswith("*")
    }
    source = ASTSource(kernel, types, constants, aligned)
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert built.asm["cubin"]
    # Products are taken by the tensor cores.
    assert "wgmma" in built.asm["ptx"] or "mma.sync" in built.asm["ptx"] or kernel is _triton.sums_kernel
    print("built")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    general = {"PREFIX": False, "EVERY": False, "MASK": 2, "BIAS": True, "SOFTCAP": True, "WINDOW": True}
    build(_triton.sums_kernel)
    build(_triton.rows_kernel)
    build(_triton.keys_kernel)
    small = {"BLOCK_M": 16, "BLOCK_N": 16, "D": 12, "BLOCK_D": 16}
    build(_triton.rows_kernel, "fp16", **general, **small, CAUSAL=False, SINKS=True)
    build(_triton.keys_kernel, "fp16", **general, **small, CAUSAL=False, INDEX=True)
