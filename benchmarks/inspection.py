"""Memory and time of ``lightning-qk inspect`` on large checkpoints: ``python benchmarks/inspection.py``.

A checkpoint of random numbers in the shape of a large model is written into a temporary folder, with no more than
the shards that hold query and key weights. Each figure comes from a process of its own: its peak memory is what
the system says of it, and its time is set beside two yardsticks: what any program would do to the same end (read
the weights as float32, multiply ``W_k W_q^T``, solve), and the bare minimum: reading the bytes, and LAPACK's
share of the eigenproblem, without a product.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

# Llama's shapes of 7 and 70 billion parameters, with 8 key heads.
SHAPES: dict[str, dict[str, int]] = {
    "7B": {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "mlp": 14336, "vocabulary": 128256},
    "70B": {"layers": 80, "width": 8192, "heads": 64, "kv_heads": 8, "mlp": 28672, "vocabulary": 128256},
}


def write_checkpoint(folder: Path, shape: dict[str, int]) -> int:
    """Write a sharded Llama in bfloat16 of which the query and key shards alone are there; their bytes."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=shape["width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        intermediate_size=shape["mlp"],
        vocab_size=shape["vocabulary"],
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    d_head = shape["width"] // shape["heads"]
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape["width"], shape["width"], generator=generator).mul_(0.02).bfloat16()
    total, index = 0, {}
    rest = ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    for layer in range(shape["layers"]):
        name = f"model.layers.{layer}"
        tensors = {
            f"{name}.self_attn.q_proj.weight": base.roll(layer, 1).contiguous(),
            f"{name}.self_attn.k_proj.weight": base[: shape["kv_heads"] * d_head]
            .roll(-layer, 1)
            .contiguous(),
        }
        shard = f"model-{layer:05d}.safetensors"
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        # The norm in front, which is folded in.
        tensors[f"{name}.input_layernorm.weight"] = torch.ones(shape["width"], dtype=torch.bfloat16)
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, shard))
        index.update({f"{name}.{own}.weight": "model-rest.safetensors" for own in rest})
        index[f"{name}.post_attention_layernorm.weight"] = "model-rest.safetensors"
    index.update(
        dict.fromkeys(
            ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"), "model-rest.safetensors"
        )
    )
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return total


def job(kind: str, folder: Path) -> dict[str, float]:
    """One measurement, in this process: seconds, and its peak memory in bytes."""
    shape = json.loads((folder / "config.json").read_text())
    heads, d_head = shape["num_attention_heads"], shape["hidden_size"] // shape["num_attention_heads"]
    if kind == "read":
        import safetensors.torch  # noqa: F401  (not part of the time)
    elif kind in ("moments", "inspect"):
        from transformers import LlamaForCausalLM  # noqa: F401

        import lightning_qk.cli.inspect
        import lightning_qk.inspect.export
        import lightning_qk.inspect.read  # noqa: F401
    begin, worked = time.perf_counter(), time.process_time()
    if kind == "read":
        _read(folder)
    elif kind == "bytes":
        _read_bytes(folder)
    elif kind == "lapack":
        _lapack(shape["num_hidden_layers"], heads, d_head)
    elif kind == "eigenvalues":
        _solve(shape["num_hidden_layers"], heads, shape["num_key_value_heads"], d_head, shape["hidden_size"])
    else:
        from lightning_qk.cli.command import main

        options = ["--moments-only"] if kind == "moments" else []
        if main(["inspect", str(folder), *options, "--json", str(folder / "out.json")]):
            raise SystemExit(f"inspect of {folder} failed")
    return {
        "seconds": time.perf_counter() - begin,
        "work": time.process_time() - worked,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
    }


def _read(folder: Path) -> None:
    """What has to be read in any case: every query and key weight, into memory, as float32."""
    from safetensors import safe_open

    for path in sorted(folder.glob("model-0*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                file.get_tensor(name).float()


def _read_bytes(folder: Path) -> None:
    """The files' bytes into one buffer, as fast as the system gives them; inspect finds them in its cache too."""
    buffer = bytearray(16 << 20)
    for path in sorted(folder.glob("model-0*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _lapack(layers: int, heads: int, d_head: int) -> None:
    """Eigenvalues of matrices of a head's width that are at hand, for every head."""
    cores = torch.randn(heads, d_head, d_head, generator=torch.Generator().manual_seed(0))
    for _ in range(layers):
        torch.linalg.eigvals(cores)


def _solve(layers: int, heads: int, kv_heads: int, d_head: int, width: int) -> None:
    """The eigenproblem of weights that are in memory: ``W_k W_q^T`` and its eigenvalues, for every head."""
    from lightning_qk.functional import qk_eigenvalues

    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(count, d_head, width, generator=generator) for count in (heads, kv_heads))
    for _ in range(layers):
        qk_eigenvalues(query, key)


def measure(kind: str, folder: Path, threads: int = 1) -> dict[str, float]:
    """A measurement in a process of its own."""
    # The command asks for huge pages before torch is imported; the yardsticks are as torch is without.
    huge = "os.environ['THP_MEM_ALLOC_ENABLE'] = '1'; " if kind in ("moments", "inspect") else ""
    code = (
        f"import os, sys, json; {huge}import torch; torch.set_num_threads({threads}); "
        f"import importlib.util as u; s = u.spec_from_file_location('inspection', {str(Path(__file__))!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); from pathlib import Path; "
        f"print('RESULT', json.dumps(m.job({kind!r}, Path({str(folder)!r}))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(threads),
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


def environment(threads: int) -> dict[str, str]:
    """Variables of a process that imports the package beside this file, with so many threads."""
    root = Path(__file__).parents[1]
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def compare(shape: dict[str, int], threads: int = 1, repeats: int = 3) -> dict[str, Any]:
    """All figures of one shape; of repeated times the shortest, taken in turns."""
    kinds = ("bytes", "lapack", "read", "eigenvalues", "moments", "inspect")
    with tempfile.TemporaryDirectory(prefix="lightning-qk-") as name:
        folder = Path(name)
        size = write_checkpoint(folder, shape)
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(repeats):
            for kind in kinds:
                found[kind].append(measure(kind, folder, threads))
    best, work = (
        {kind: min(one[what] for one in runs) for kind, runs in found.items()} for what in ("seconds", "work")
    )
    peak = {kind: max(one["peak"] for one in runs) for kind, runs in found.items()}
    return {
        "bytes": size,
        "seconds": best,
        "work": work,
        "peak": peak,
        "ratio": best["inspect"] / (best["read"] + best["eigenvalues"]),
        "ratio_work": work["inspect"] / (work["read"] + work["eigenvalues"]),
        "bare": best["inspect"] / (best["bytes"] + best["lapack"]),
        "bare_work": work["inspect"] / (work["bytes"] + work["lapack"]),
        "moments_read": best["moments"] / best["read"],
        "moments_read_work": work["moments"] / work["read"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7B")
    parser.add_argument("--layers", type=int, help="fewer layers, where the disk is small")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--json", type=Path, help="write the figures here; docs/inspection.json is the page's"
    )
    options = parser.parse_args()
    shape = dict(SHAPES[options.shape])
    shape["layers"] = options.layers or shape["layers"]
    found = compare(shape, options.threads, options.repeats)
    if options.json:
        facts = {"shape": options.shape, "layers": shape["layers"], "threads": options.threads}
        about = {**facts, "repeats": options.repeats, "load": round(os.getloadavg()[1], 1)}
        options.json.write_text(json.dumps({**about, **found}, indent=2) + "\n")
    print(
        f"{options.shape}, {shape['layers']} layers, {found['bytes'] / 1e9:.2f} GB of query and key weights"
    )
    for kind, seconds in found["seconds"].items():
        work, peak = found["work"][kind], found["peak"][kind] / 1e9
        print(f"{kind:<12} {seconds:7.2f} s, {work:7.2f} s of processor, peak {peak:.2f} GB")
    for name, what in (
        ("ratio", "inspect / (read + eigenvalues)"),
        ("bare", "inspect / (bytes + lapack)"),
        ("moments_read", "inspect --moments-only / read"),
    ):
        print(f"{what}: {found[name]:.2f}; of processor time {found[name + '_work']:.2f}")


if __name__ == "__main__":
    main()
