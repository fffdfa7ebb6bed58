"""Many layers and many heads: time and memory of each callback, record and report, and how many keys are logged.

    python benchmarks/wide.py [--json docs/performance.json] [--shapes llama:200:64 mla:61:128 ...]

Each callback is alone with the same training in a process of its own, measured on every step, by the processor's
time. Heads are 4 wide and sequences 16 long, so that two cores are enough: what is shown is what grows with layers
and heads, and not what attention itself costs. Exponents are from the growth of 50 to 200 layers, and of 32 to 128
heads.
"""

import argparse
import json
import math
import multiprocessing
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from harness import slope
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader

from lightning_qk import AttentionMonitor, LocAteR, QKSpectrumMonitor

WIDTH, LENGTH, STEPS, VOCABULARY = 4, 16, 4, 100
VARIANTS = ("none", "spectrum", "attention", "locater", "all")
SHAPES = ("llama:50:64", "llama:200:64", "mla:61:32", "mla:61:128")


def network(kind: str, layers: int, heads: int) -> torch.nn.Module:
    """A language model of so many layers and heads, and as little else as there can be."""
    common: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": 64,
        "vocab_size": VOCABULARY,
        "use_cache": False,
    }
    if kind == "llama":
        config = transformers.LlamaConfig(hidden_size=heads * WIDTH, **common)
        return transformers.LlamaForCausalLM(config)
    config = transformers.DeepseekV3Config(
        hidden_size=128,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=WIDTH,
        qk_nope_head_dim=WIDTH,
        v_head_dim=WIDTH,
        first_k_dense_replace=layers,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        **common,
    )
    return transformers.DeepseekV3ForCausalLM(config)


class Job(L.LightningModule):
    """A language model's training."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.network = model

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.network(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Keys(Logger):
    """Remembers the names of what is logged."""

    name, version = "keys", 0

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.keys |= {key for key in metrics if key not in ("epoch", "step")}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Clock(L.Callback):
    """Processor's seconds from one batch's start to the next."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.starts.append(time.process_time())


def run(kind: str, layers: int, heads: int, variant: str) -> dict[str, float]:
    """One training; seconds of its first step, of the others (their least), of its end; memory and keys."""
    torch.manual_seed(0)
    callbacks = {
        "spectrum": lambda: QKSpectrumMonitor(every_n_steps=1),
        "attention": lambda: AttentionMonitor(every_n_steps=1),
        "locater": lambda: LocAteR(1e-3),
    }
    names = tuple(callbacks) if variant == "all" else () if variant == "none" else (variant,)
    clock, keys = Clock(), Keys()
    job = Job(network(kind, layers, heads))
    data = torch.randint(3, VOCABULARY, (STEPS, LENGTH))
    # The model's gradients, and what torch takes once.
    job.network(input_ids=data[:1], labels=data[:1]).loss.backward()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=STEPS,
            callbacks=[clock, *(callbacks[name]() for name in names)],
            logger=keys,
            log_every_n_steps=1,
            accelerator="cpu",
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(job, DataLoader(data))
        end = time.process_time() - clock.starts[-1]
        written = {file.suffix: file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()}
    steps = [after - before for before, after in zip(clock.starts, clock.starts[1:], strict=False)]
    return {
        "first": steps[0],
        "step": min(steps[1:]),
        "end": max(0.0, end - min(steps[1:])),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "keys": len(keys.keys),
        "report": written.get(".html", 0) / 1e6,
        "record": sum(size for kind, size in written.items() if kind != ".html") / 1e6,
    }


def measure(shape: str) -> dict[str, dict[str, float]]:
    """Every variant of a shape, each in a process of its own, forked before torch has threads."""
    kind, layers, heads = shape.split(":")
    found = {}
    for variant in VARIANTS:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found[variant] = pool.apply(run, (kind, int(layers), int(heads), variant))
        print(shape, variant, {name: round(value, 3) for name, value in found[variant].items()}, flush=True)
    return found


def exponents(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """How what is added grows: with layers, and with heads."""
    out: dict[str, dict[str, float]] = {}
    for kind, place in (("llama", 1), ("mla", 2)):
        own = {int(shape.split(":")[place]): by for shape, by in found.items() if shape.startswith(kind)}
        if len(own) < 2:
            continue
        out["layers" if place == 1 else "heads"] = {
            variant: slope(
                list(own), [max(by[variant]["step"] - by["none"]["step"], 1e-4) for by in own.values()]
            )
            for variant in VARIANTS[1:]
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="KIND:LAYERS:HEADS, of llama and mla")
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    found = {shape: measure(shape) for shape in arguments.shapes}
    grown = exponents(found)
    for along, by in grown.items():
        print(f"exponents in {along}:", {name: round(value, 2) for name, value in by.items()})
    if arguments.json:
        figures = json.loads(arguments.json.read_text())
        figures["wide"] = {
            "shapes": found,
            "exponents": {k: v for k, v in grown.items() if math.isfinite(sum(v.values()))},
        }
        arguments.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
