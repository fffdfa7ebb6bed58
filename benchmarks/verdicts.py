"""How many heads are flagged in models that are healthy, fresh, or broken on purpose: the calibration of verdicts.

    python benchmarks/verdicts.py [--packages FOLDER] [--text FILE] [--models NAME ...] [--runs CACHE]

SmolLM2 and MiniLM are found as ``benchmarks/predictions.py`` finds them; toys are trained here for a minute. The
query weights of the scaled models are multiplied by 20. What ``lightning-qk inspect --text`` says is what counts.
With ``--runs`` also the records that ``benchmarks/collapse/run.py`` has in its cache: what the table at the end of
each run says of its heads, whether a layer that the guard's alarm names is flagged, and ``attn/health``: its least
and last value, and the first step with one below 1.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from lightning_qk import head_projections
from lightning_qk.cli import main as command
from lightning_qk.record.history import History, LayerShape, RunRecord
from lightning_qk.record.verdicts import FLAGGED, head_health, healthy_share, layer_health

FACTOR = 20.0
TOYS: dict[str, dict[str, Any]] = {
    "gpt2-like": {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 64},
    "llama-like": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
    },
}


def verdicts(model: nn.Module, tokenizer: Any, text: str, length: int, batches: int) -> list[str]:
    """What ``inspect --text`` says of every head of a model."""
    with tempfile.TemporaryDirectory(prefix="lightning-qk-") as name:
        folder = Path(name)
        model.save_pretrained(folder / "model")  # type: ignore[operator]
        tokenizer.save_pretrained(folder / "model")
        out = folder / "out.json"
        line = ["inspect", str(folder / "model"), "--text", text, "--json", str(out), "--moments-only"]
        with contextlib.redirect_stdout(io.StringIO()):
            status = command([*line, "--length", str(length), "--batches", str(batches)])
        if status:
            raise SystemExit(f"inspect failed on {name}")
        layers = json.loads(out.read_text())["checkpoints"][0]["layers"]
    return [verdict for layer in layers for verdict in layer["per_head"]["verdict"]]


@torch.no_grad()
def scaled(model: nn.Module) -> nn.Module:
    """The model with the query weights, and biases, of all layers multiplied by 20, in place."""
    for layer in head_projections(model).values():
        layer.query.mul_(FACTOR)
        if layer.query_bias is not None:
            layer.query_bias.mul_(FACTOR)
    return model


def fresh(model: nn.Module) -> nn.Module:
    """A model of the same configuration with the weights of its initialization."""
    torch.manual_seed(0)
    return type(model)(model.config)


def pretrained(name: str, packages: Path | None) -> tuple[nn.Module, Any]:
    """SmolLM2 or MiniLM, and the tokenizer."""
    from predictions import load

    model, tokenizer = load(name, packages)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # its numbers are dequantized
        model = _unquantized(model)
    return model, tokenizer


def _unquantized(model: nn.Module) -> nn.Module:
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    return plain


def trained_toy(kind: str, steps: int = 300) -> tuple[nn.Module, Any]:
    """A small decoder after some hundred healthy steps on the text of Python's library, by bytes."""
    import lightning as L

    from lightning_qk import TextDataModule, TransformerModule
    from lightning_qk.data.tokenizers import byte_tokenizer

    L.seed_everything(1, verbose=False)
    module = TransformerModule(TOYS[kind], "causal_lm", lr=3e-3, schedule="constant", warmup_steps=30)
    with tempfile.TemporaryDirectory() as cache:
        data = TextDataModule(
            "stdlib",
            "causal_lm",
            "bytes",
            block_size=64,
            batch_size=8,
            max_characters=400_000,
            cache_dir=cache,
        )
        L.Trainer(
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            accelerator="cpu",
        ).fit(module, data)
    return module.network.eval(), byte_tokenizer()


def report(name: str, kind: str, found: list[str], seconds: float) -> dict[str, Any]:
    """Print a line."""
    flagged = sum(verdict in FLAGGED for verdict in found)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in Counter(found).most_common())
    print(
        f"{name:11} {kind:8} {len(found):5} {flagged / len(found):8.1%}  {seconds:5.0f} s  {counts}",
        flush=True,
    )
    return {"model": name, "kind": kind, "heads": len(found), "flagged": flagged, "counts": Counter(found)}


def main() -> int:
    """Print a table; the status is 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, help="folder of unpacked wheels")
    parser.add_argument("--text", default="stdlib", help="file; default: the text of Python's library")
    parser.add_argument("--models", nargs="*", default=["smollm2", "minilm", *TOYS])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batches", type=int, default=2, help="of 4 sequences")
    parser.add_argument("--kinds", nargs="*", default=["healthy", "fresh", "scaled"])
    parser.add_argument("--runs", type=Path, help="cache of benchmarks/collapse/run.py")
    given = parser.parse_args()
    print(f"{'model':11} {'kind':8} {'heads':>5} {'flagged':>8}  {'time':>7}  verdicts")
    rows = []
    kinds: dict[str, Callable[[nn.Module], nn.Module]] = {
        "healthy": lambda model: model,
        "fresh": fresh,
        "scaled": scaled,
    }
    for name in given.models:
        model, tokenizer = trained_toy(name) if name in TOYS else pretrained(name, given.packages)
        for kind in given.kinds:
            change = kinds[kind]
            begin = time.perf_counter()
            found = verdicts(change(model).eval(), tokenizer, given.text, given.length, given.batches)
            rows.append(report(name, kind, found, time.perf_counter() - begin))
    missed = [row for row in rows if not _is_met(row)]
    are_met = given.runs is None or of_runs(given.runs)
    for row in missed:
        print(f"missed: {row['model']} {row['kind']}")
    return int(bool(missed) or not are_met)


def of_runs(cache: Path) -> bool:
    """Print what is said of recorded trainings; whether the bars are met."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "collapse"))
    from evaluate import first_alarm
    from runs import ROUGH

    rough = {run.name for run in ROUGH}
    heads, flagged, missed = 0, 0, []
    print(
        f"{'run':22} {'meant to':8} {'flagged':>8} {'health':>12} {'below 1':>7} {'alarm':>5}  "
        "layers; what the guard names first"
    )
    for path in sorted(cache.glob("*.json")):
        found = json.loads(path.read_text())
        if "attention" not in found:
            continue
        record = _record_of(found)
        rows, layers = head_health(record), {row.label: row.verdict for row in layer_health(record)}
        count, alarm = sum(row.verdict in FLAGGED for row in rows), first_alarm(found)
        is_rough = found["name"] in rough or found["name"].endswith("-healthy")
        if is_rough:
            heads, flagged = heads + len(rows), flagged + count
        named = sorted({label for label in layers if alarm is not None and label in alarm.reason})
        if not is_rough and any(layers[label] not in FLAGGED for label in named):
            missed.append(found["name"])
        said = ", ".join(named) or ("-" if alarm is None else alarm.reason[:40])
        steps, course = health_of_run(record)
        below = next((str(step + 1) for step, one in zip(steps, course, strict=True) if one < 1), "-")
        print(
            f"{found['name']:22} {'train' if is_rough else 'fail':8} {count / len(rows):8.1%} "
            f"{min(course):5.2f}, {course[-1]:5.2f} {below:>7} {'-' if alarm is None else alarm.step:>5}  "
            f"{' '.join(layers.values())}; {said}",
            flush=True,
        )
    print(
        f"runs meant to train: {flagged} of {heads} heads flagged; named and not flagged: {missed or 'none'}"
    )
    return heads == 0 or flagged <= 0.02 * heads


def health_of_run(record: RunRecord) -> tuple[list[int], list[float]]:
    """What ``attn/health`` would have been at every step of a run: steps, from 0, and values."""
    assert record.attention is not None
    grown = RunRecord(shapes=record.shapes)
    histories = {name: History(one.layers, one.heads, len(one) + 2) for name, one in record.histories.items()}
    taken = dict.fromkeys(histories, 0)
    grown.histories = histories
    course = []
    for step in record.attention.steps:
        for name, whole in record.histories.items():
            # Cosines were kept by the number of steps done, the others by the step's own.
            while taken[name] < len(whole) and whole.steps[taken[name]] <= step + (name == "hidden"):
                index = taken[name]
                histories[name].append(
                    whole.steps[index], {key: column[index] for key, column in whole.values.items()}
                )
                taken[name] += 1
        course.append(healthy_share(grown))
    return record.attention.steps, course


def _record_of(found: dict[str, Any]) -> RunRecord:
    """What the monitors of a run would have remembered of all its readings."""
    record = RunRecord()
    for group in ("attention", "spectrum"):
        own = found[group]
        history = History(own["layers"], own["heads"], max(len(own["steps"]), 2))
        for index, step in enumerate(own["steps"]):
            history.append(step, {name: torch.tensor(rows[index]) for name, rows in own["values"].items()})
        setattr(record, group, history)
    layers, cosine = found["attention"]["layers"], found["cosine"]
    hidden = History(layers, [1] * len(layers), max(len(cosine["steps"]), 2))
    for step, values in zip(cosine["steps"], cosine["values"], strict=True):
        # Of the tokens before each layer, and those before the next one leave it; the last layer has its own.
        hidden.append(step, {"cosine": torch.tensor([*values[1:], values[-1]])})
    record.hidden = hidden
    width = 32 if found["name"].startswith("vit") else 64
    record.shapes = {
        layer: LayerShape(width // heads, width, (width // heads) ** -0.5)
        for layer, heads in zip(layers, found["spectrum"]["heads"], strict=True)
    }
    return record


def _is_met(row: dict[str, Any]) -> bool:
    share = row["flagged"] / row["heads"]
    if row["kind"] == "fresh":
        return bool(row["counts"]["fresh"] == row["heads"])
    return share <= 0.02 if row["kind"] == "healthy" else share >= 0.9


if __name__ == "__main__":
    raise SystemExit(main())
