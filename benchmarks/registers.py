"""Registers, spills and shared memory of the Triton kernels, without a GPU: Triton's compiler and ptxas suffice.

    python benchmarks/registers.py [--json docs/performance.json] [--check docs/performance.json] [names ...]

Prints a table of the code for sm_80, sm_90 and sm_100, in the launch shapes that `functional/_kernel.py` takes.
With ``--json`` it is kept in that file; with ``--check`` the command fails where more is spilt than is kept there,
or, by the same version of Triton, where the code needs more registers or shared memory.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from lightning_qk.functional import _kernel, _triton_keys, _triton_rows

CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
# As a plain causal call has them; cases say what is otherwise.
FLAGS: dict[str, Any] = {
    "CAUSAL": True,
    "WINDOW": False,
    "SOFTCAP": False,
    "BIAS": False,
    "MASK": 0,
    "SINKS": False,
    "INDEX": False,
    "OWN_MASK": False,
    "LINEAR": True,
    "PREFIX": True,
    "EVERY": True,
    "JOINT": True,
    "PRECISION": "tf32",
}
GENERAL = {"PREFIX": False, "EVERY": False}
FLOAT32 = {"JOINT": False, "PRECISION": "ieee"}
NUMBERS = dict.fromkeys(("scale", "cap", "masked_below"), "fp32")
ROWS, KEYS = _triton_rows.rows_kernel, _triton_keys.keys_kernel


class Case(NamedTuple):
    """A kernel as it is compiled for one kind of call."""

    kernel: Any
    d_head: int
    dtype: torch.dtype = torch.bfloat16
    flags: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "rows, causal, one sweep": Case(ROWS, 128, flags={"LINEAR": False, "PREFIX": False}),
    "rows, causal": Case(ROWS, 128),
    "rows, causal, d 64": Case(ROWS, 64),
    "rows, causal, d 256": Case(ROWS, 256),
    "rows, both sides": Case(ROWS, 128, flags={"CAUSAL": False}),
    "rows, window": Case(ROWS, 128, flags={**GENERAL, "WINDOW": True}),
    "rows, mask": Case(ROWS, 128, flags={**GENERAL, "MASK": 1, "CAUSAL": False}),
    "rows, soft cap, bias, sinks": Case(
        ROWS, 128, flags={**GENERAL, "SOFTCAP": True, "BIAS": True, "SINKS": True}
    ),
    "rows, sampled": Case(ROWS, 128, flags={**GENERAL, "INDEX": True}),
    "rows, float32": Case(ROWS, 64, torch.float32, FLOAT32),
    "keys, causal": Case(KEYS, 128),
    "keys, causal, d 64": Case(KEYS, 64),
    "keys, causal, d 256": Case(KEYS, 256),
    "keys, both sides": Case(KEYS, 128, flags={"CAUSAL": False}),
    "keys, window": Case(KEYS, 128, flags={**GENERAL, "WINDOW": True}),
    "keys, mask": Case(KEYS, 128, flags={**GENERAL, "MASK": 1, "CAUSAL": False}),
    "keys, sampled": Case(KEYS, 128, flags={**GENERAL, "INDEX": True}),
    "keys, float32": Case(KEYS, 64, torch.float32, FLOAT32),
}


class Use(NamedTuple):
    """What one kernel takes: registers of a thread, bytes of them that are spilt, bytes of shared memory."""

    registers: int
    spilt: int
    shared: int


def compile_case(case: Case, capability: tuple[int, int]) -> Use:
    """Compile a kernel in the shape of its launch, down to machine code."""
    flags = {**FLAGS, **case.flags}
    shape = _kernel.launch_shapes(
        case.dtype,
        case.d_head,
        capability,
        is_simple=flags["PREFIX"] and flags["CAUSAL"],
        is_loaded=flags["MASK"] != 0 or flags["BIAS"],
        sampled=64 if flags["INDEX"] else None,
    )[0 if case.kernel is ROWS else 1]
    flags |= {
        "D": case.d_head,
        "BLOCK_D": case.d_head,
        "BLOCK_M": shape.rows,
        "BLOCK_N": shape.keys,
    }
    kind = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[case.dtype]
    pointers = dict.fromkeys(("prefix", "sinks", "values", "state", "out"), "*fp32")
    pointers |= dict.fromkeys(("query", "key", "bias"), kind)
    pointers |= {"used": "*u8", "index": "*i64", "reach": "*i32" if flags["MASK"] else kind}
    pointers["mask"] = {0: kind, 1: "*u8", 2: "*fp32"}[flags["MASK"]]
    names = case.kernel.arg_names
    constants = {name: flags[name] for name in names if name in flags}
    constants |= {name: 1 for name in names if name in ("query_d", "key_d", "bias_m", "mask_m")}
    types = {name: (pointers | NUMBERS).get(name, "i32") for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    # Addresses and strides are multiples of 16.
    multiples = {*pointers, "query_b", "query_h", "query_n", "key_b", "key_h", "key_m"}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in multiples}
    architecture = capability[0] * 10 + capability[1]
    built = triton.compile(
        ASTSource(case.kernel, types, constants, aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True},
    )
    # Products are taken by the tensor cores.
    assert case.dtype == torch.float32 or re.search(r"wgmma|mma\.sync|tcgen05", built.asm["ptx"])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(built.asm["ptx"])
        target = re.search(r"^\.target (\S+)", built.asm["ptx"], re.MULTILINE)
        assert target is not None
        name = target[1].rstrip(",")
        told = subprocess.run(
            [get_ptxas(architecture).path, "-v", f"--gpu-name={name}", source, "-o", Path(folder, "out")],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    numbers = [re.search(pattern, told) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
    assert all(numbers), told
    registers, spilt = (int(found[1]) for found in numbers if found is not None)
    return Use(registers, spilt, built.metadata.shared)


def measure(names: list[str]) -> dict[str, dict[str, Use]]:
    """What each case takes, by architecture."""
    found: dict[str, dict[str, Use]] = {}
    for name in names:
        found[name] = {arch: compile_case(CASES[name], own) for arch, own in CAPABILITIES.items()}
        parts = (
            f"{arch} {use.registers:>3} / {use.spilt} / {use.shared / 1024:.0f} K"
            for arch, use in found[name].items()
        )
        print(f"{name:<28} {'   '.join(parts)}", flush=True)
    return found


def worse(found: dict[str, dict[str, Use]], kept: dict[str, Any]) -> list[str]:
    """In what the code is worse than what is kept."""
    same = kept["triton"] == triton.__version__
    said = []
    for name, by in found.items():
        for arch, use in by.items():
            before = Use(*kept["kernels"][name][arch])
            if use.spilt > before.spilt or (
                same and (use.registers > before.registers or use.shared > before.shared)
            ):
                said.append(f"{name}, {arch}: {use._asdict()}, kept {before._asdict()}")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="; ".join(CASES))
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    parser.add_argument("--check", type=Path, help="where they are kept")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(CASES)
    if unknown:
        parser.error(f"expected names among {'; '.join(CASES)}, got {'; '.join(sorted(unknown))}")
    warnings.simplefilter("ignore")
    print("registers of a thread / bytes spilt / shared memory")
    found = measure(arguments.names or list(CASES))
    if arguments.json:
        figures = json.loads(arguments.json.read_text())
        figures["kernels"] = {"triton": triton.__version__, "kernels": found}
        arguments.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    said = worse(found, json.loads(arguments.check.read_text())["kernels"]) if arguments.check else []
    print(*said, sep="\n")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
