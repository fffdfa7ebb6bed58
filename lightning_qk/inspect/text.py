"""Attention statistics of a checkpoint on text: here the model is built with all its weights and run."""

import inspect
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk._printable import one_line
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.attention import SINK_ATTENTION, AttentionSums, MeanSums, attention_sums
from lightning_qk.functional.logits import AttentionLogits
from lightning_qk.functional.position import positional_share
from lightning_qk.functional.propagation import PROFILE_BINS, profile_sums
from lightning_qk.heads import head_projections
from lightning_qk.inspect.documents import BadInput
from lightning_qk.inspect.matching import Weights
from lightning_qk.inspect.read import Reading
from lightning_qk.inspect.skeleton import fill
from lightning_qk.inspect.sources import Checkpoint
from lightning_qk.metrics.attention import AttentionStatistics
from lightning_qk.metrics.collector import AttentionCollector, LayerFacts
from lightning_qk.metrics.means import HeadMeans
from lightning_qk.tokens import TokenMomentsWarning, predict_attention, token_moments

_ENOUGH_CHARACTERS = 40  # a token, at most, in any language
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
)


def tokenizer_of(checkpoint: Checkpoint, named: str | None) -> Any:
    """The tokenizer of a checkpoint, or the one that was named.

    Raises:
        BadInput: there is none.
    """
    from lightning_qk.data.tokenizers import load_tokenizer

    name = named or checkpoint.tokenizer
    if name is None:
        raise BadInput(
            f"expected a tokenizer for --text, got none with {checkpoint.title}: pass a folder or a name on "
            "the hub, or 'bytes', with --tokenizer"
        )
    path = Path(name).expanduser()
    if named is None and path.is_dir() and not any((path / file).is_file() for file in _TOKENIZER_FILES):
        raise BadInput(
            f"expected a tokenizer for --text, got none in {path}: pass a folder or a name on the hub, or "
            "'bytes', with --tokenizer"
        )
    try:
        return load_tokenizer(str(path) if path.exists() else name, "--tokenizer")
    except ValueError as error:
        raise BadInput(str(error)) from error


def read_text(source: str, characters: int) -> str:
    """The beginning of a file, or of the standard library's text for ``"stdlib"``.

    Raises:
        BadInput: the file cannot be read as UTF-8 text, or is empty.
    """
    if source == "stdlib":
        from lightning_qk.data.stdlib import stdlib_texts

        return "\n".join(stdlib_texts(max_characters=characters))
    try:
        with open(source, encoding="utf-8") as file:
            text = file.read(characters)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise BadInput(
            f"expected a file of UTF-8 text after --text, got {source} ({reason}): pass another, or 'stdlib'"
        ) from error
    if not text.strip():
        raise BadInput(f"expected text after --text, got {source}, which is empty: pass another, or 'stdlib'")
    return text


def measure(
    model: nn.Module,
    weights: Weights,
    checkpoint: Checkpoint,
    reading: Reading,
    *,
    source: str,
    tokenizer: str | None = None,
    length: int = 128,
    batches: int = 4,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run a checkpoint on text and add its attention statistics to what was read.

    Args:
        model: the skeleton, which is filled.
        weights: of the checkpoint.
        checkpoint: where the tokenizer is.
        reading: given ``attention``, statistic → one number a head, and ``profile``.
        source: a file, or ``"stdlib"``.
        tokenizer: instead of the checkpoint's own.
        length: tokens in a sequence; fewer where the model takes fewer.
        batches: how many, at most.
        batch_size: sequences in each.
        progress: called after every batch.

    Raises:
        BadInput: no tokenizer, no text, or a model that does not run on tokens.
    """
    own: Any = model
    if getattr(own, "main_input_name", "input_ids") != "input_ids":
        raise BadInput(
            f"expected a model of text for --text, got a {type(model).__name__} that takes "
            f"{own.main_input_name}: leave --text out"
        )
    count = batches * batch_size
    # As much again behind it, to take moments of.
    blocks = text_blocks(model, tokenizer_of(checkpoint, tokenizer), source, length, 2 * count)
    ids, others = blocks[:count], blocks[count:]
    missing = fill(model, weights)
    if missing:
        reading.notes.append(
            f"{len(missing)} parameters that the checkpoint lacks are zero ({', '.join(missing[:3])})"
        )
    facts = map(LayerFacts, reading.heads, reading.self_attention)
    causal: dict[str, bool] = {}

    def measure_call(name: str, call: CapturedCall) -> dict[str, AttentionSums | MeanSums]:
        logits = call.logits()
        causal[name] = causal.get(name, True) and is_causal(logits)
        return _measure(logits, call.self_attention)

    collector = AttentionCollector(
        model,
        measure_call,
        modules={name: model.get_submodule(name) for name in reading.names},
        layers=dict(zip(reading.names, facts, strict=True)),
    )
    parts = ids.split(batch_size)
    try:
        with torch.no_grad(), collector:
            for count, part in enumerate(parts, 1):
                model(**_arguments(model, part))
                if progress is not None:
                    progress(count, len(parts))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise BadInput(
            f"expected a model that runs on tokens for --text, got {type(model).__name__}, which refuses them "
            f"({one_line(error)}): leave --text out"
        ) from error
    metric = AttentionStatistics(collector.heads)
    collector.pool.into(metric, "attention")
    values = metric.compute()
    collector.blank_positions(metric, values)
    reading.attention = {name: value for name, value in values.items() if not name.endswith("_se")}
    position = HeadMeans(collector.heads, ["positional_share"])
    collector.pool.into(position, "position")
    reading.attention |= position.compute()
    reading.layer_values["sink_heads"] = torch.tensor(
        [_sink_heads(part) for part in reading.split(reading.attention["sink_first"])]
    )
    curves = HeadMeans(collector.heads, [str(part) for part in range(PROFILE_BINS)])
    collector.pool.into(curves, "profile")
    profile = torch.stack(list(curves.compute().values())).reshape(PROFILE_BINS, -1).mT
    reading.profile = dict(zip(reading.labels, reading.split(profile), strict=True))
    reading.facts["Text"] = f"{source}, {ids.numel()} tokens in sequences of {ids.shape[1]}"
    reading.notes += [
        f"no attention of {name} is measured: {reason}" for name, reason in collector.left_out.items()
    ]
    _predict(model, reading, others if len(others) else ids, ids.shape[1], causal)
    reading.facts["Moments"] = (
        f"the {others.numel()} tokens of the text behind them" if len(others) else "the same tokens"
    )
    silent = collector.silent()
    if silent:
        reading.notes.append(f"no attention call of {len(silent)} layers was seen ({', '.join(silent[:3])})")


def text_blocks(model: nn.Module, tokenizer: Any, source: str, length: int, count: int) -> Tensor:
    """The beginning of a text as sequences of tokens, of shape ``(count, length)`` or less.

    Args:
        model: with its longest sequence and vocabulary in its config.
        tokenizer: from :func:`tokenizer_of`.
        source: a file, or ``"stdlib"``.
        length: tokens in a sequence; fewer where the model takes fewer.
        count: how many sequences, at most.

    Raises:
        BadInput: no text, or tokens that the model does not know.
    """
    own: Any = model
    length = min(length, _longest(own.config) or length)
    ids = _blocks(tokenizer, read_text(source, count * length * _ENOUGH_CHARACTERS), length)[:count]
    size = getattr(own.config.get_text_config(), "vocab_size", None)
    if isinstance(size, int) and int(ids.max()) >= size:
        raise BadInput(
            f"expected tokens below the model's {size}, got {int(ids.max())}: the tokenizer is that of "
            "another model; pass its own with --tokenizer"
        )
    return ids


def _measure(logits: AttentionLogits, own: bool | None) -> dict[str, AttentionSums | MeanSums]:
    sums = attention_sums(logits)
    share = positional_share(logits) if own else torch.full(logits.shape[1:2], torch.nan)
    share = share.to(sums.total)
    position = MeanSums(share.nan_to_num()[None, None], (~share.isnan()).to(share)[None, None])
    return {"attention": sums, "profile": profile_sums(logits), "position": position}


def is_causal(logits: AttentionLogits) -> bool:
    """Whether the first query of a call sees one key alone."""
    if min(logits.shape[2:]) < 2:
        return False
    return int(logits.chunk(slice(0, 2), logits.buffer(2)).keys.min()) == 1


def _sink_heads(share: Tensor) -> float:
    """Sink₁ of Gu et al.: the share of heads whose first key takes over 0.3."""
    known = share[~share.isnan()]
    return float((known > SINK_ATTENTION).double().mean()) if len(known) else math.nan


def _predict(model: nn.Module, reading: Reading, ids: Tensor, length: int, causal: dict[str, bool]) -> None:
    """Add the attention that moments of tokens predict; of layers without, a note says why."""
    parts = [_arguments(model, part) for part in ids.split(4)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            moments, why = token_moments(model, parts), ""
        except (ValueError, RuntimeError) as error:
            moments, why = {}, one_line(error)
    reasons = [str(one.message) for one in said if issubclass(one.category, TokenMomentsWarning)]
    heads = head_projections(model)
    found: dict[str, dict[str, Tensor]] = {}
    for name in reading.names:
        if name not in moments or name not in heads or name not in causal:
            continue
        try:
            found[name] = predict_attention(heads[name], moments[name], length=length, is_causal=causal[name])
        except (ValueError, RuntimeError) as error:
            reasons.append(f"no attention of {name} is predicted: {one_line(error)}")
    if why and not reasons:
        reasons.append(f"no attention is predicted: {why}")
    reading.notes += reasons
    if not found:
        return
    unknown = [torch.full((count,), torch.nan) for count in reading.heads]
    statistics = next(iter(found.values()))
    reading.predicted = {
        statistic: torch.cat(
            [
                found[name][statistic].float() if name in found else nothing
                for name, nothing in zip(reading.names, unknown, strict=True)
            ]
        )
        for statistic in statistics
        if not statistic.endswith("_se")
    }


def _longest(config: Any) -> int | None:
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 8:
            # RoBERTa and similar models count from the padding token on.
            return value - 2 if value % 64 == 2 else value
    return None


def _blocks(tokenizer: Any, text: str, length: int) -> Tensor:
    # Line by line, since some tokenizers warn of, or are slow on, long texts.
    lines = text.splitlines(keepends=True)
    tokens = [token for line in lines for token in tokenizer(line, add_special_tokens=False)["input_ids"]]
    if len(tokens) < 2:
        raise BadInput(
            "expected text of at least two tokens after --text, got less: pass another file, or 'stdlib'"
        )
    length = min(length, len(tokens))
    count = len(tokens) // length
    return torch.tensor(tokens[: count * length]).view(count, length)


def _arguments(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    taken = inspect.signature(type(model).forward).parameters
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in taken:
        given["decoder_input_ids"] = ids
    return {name: value for name, value in given.items() if name in taken or name == "input_ids"}
