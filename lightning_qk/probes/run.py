"""What probes share: run a model in evaluation mode, check batches, and name the layers that are left out."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_qk.architecture.labels import shorten
from lightning_qk.capture.call import UnsupportedCallError
from lightning_qk.metrics.collector import AttentionCollector
from lightning_qk.probes._attention import Attention

_Value = TypeVar("_Value")


class ProbeWarning(UserWarning):
    """A layer is left out of a probe; the message names it and says why."""


def prepared(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments that the model is run with, on its device.

    Labels are dropped but where a decoder gets its inputs from them, and no cache is filled.

    Raises:
        TypeError: the batch is no mapping.
        ValueError: the batch holds a cache, which a run would fill.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"expected a batch that is a mapping of the model's keyword arguments, got {type(batch).__name__}: "
            "pass {'input_ids': ...}"
        )
    if batch.get("past_key_values") is not None:
        raise ValueError(
            "expected a batch without past_key_values, which a run would fill: pass whole sequences instead"
        )
    device = next((parameter.device for parameter in model.parameters()), None)
    out = {
        name: value.to(device) if isinstance(value, Tensor) and device is not None else value
        for name, value in batch.items()
        if name != "past_key_values"
    }
    if not (is_encoder_decoder(model) and out.get("decoder_input_ids") is None):
        out.pop("labels", None)
    if "use_cache" in parameters(model):
        out["use_cache"] = False
    return out


def parameters(model: nn.Module) -> set[str]:
    """Names of the arguments of a model's forward."""
    return set(inspect.signature(model.forward).parameters)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has two stacks, each with a sequence of its own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def refuse_encoder_decoder(model: nn.Module, what: str) -> None:
    """Probes of one sequence are not defined over two.

    Raises:
        ValueError: the model has an encoder and a decoder.
    """
    if is_encoder_decoder(model):
        raise ValueError(
            f"expected a model of one sequence for {what}, got {type(model).__name__}, which has an encoder and a "
            "decoder: pass its encoder, model.get_encoder()"
        )


def one_sequence(model: nn.Module, batch: Mapping[str, Any], what: str) -> tuple[dict[str, Any], Tensor]:
    """What :func:`prepared` gives, for a probe that changes tokens, and which of them are no padding.

    Args:
        model: the model.
        batch: its keyword arguments.
        what: the probe, for messages.

    Returns:
        The arguments, and tokens that the batch's two-dimensional attention mask keeps, boolean ``(batch, n)``.

    Raises:
        TypeError: the batch is no mapping.
        ValueError: the model has an encoder and a decoder, or the batch no tokens.
    """
    refuse_encoder_decoder(model, what)
    batch = prepared(model, batch)
    tokens = next(
        (batch[n] for n in ("input_ids", "inputs_embeds") if isinstance(batch.get(n), Tensor)), None
    )
    if tokens is None:
        raise ValueError(
            f"expected a batch for {type(model).__name__} with input_ids or inputs_embeds, whose tokens the probe "
            f"changes, got {sorted(batch)}: models of other inputs have no such probe"
        )
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]:
        return batch, mask.to(tokens.device) != 0
    return batch, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def last_tokens(valid: Tensor, rows: int) -> Tensor:
    """The last ``rows`` valid tokens of each sequence, in order, ``(batch, rows)``.

    A sequence with fewer repeats its first ones.
    """
    n = valid.shape[1]
    places = torch.arange(n, device=valid.device).masked_fill(~valid, -1)
    return places.topk(min(rows, n), dim=1).values.flip(1).clamp_min(0)


def check_marks(marks: Tensor | None, shape: Sequence[int], name: str) -> None:
    """Check a user's marks of tokens.

    Raises:
        ValueError: no boolean tensor of a value for each token.
    """
    if marks is None:
        return
    if not isinstance(marks, Tensor) or marks.dtype != torch.bool or tuple(marks.shape) != tuple(shape):
        got = f"{marks.dtype} of shape {tuple(marks.shape)}" if isinstance(marks, Tensor) else repr(marks)
        raise ValueError(
            f"expected {name} as a boolean tensor (batch, tokens) = {tuple(shape)}, got {got}: one value for each "
            "token"
        )


def own_generator(generator: torch.Generator | None) -> torch.Generator:
    """The given one, or a fresh one: never torch's global one, so that a probe gives the same value twice."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def results(collector: AttentionCollector, values: Mapping[str, _Value]) -> dict[str, _Value]:
    """Values of the layers that are not left out, in the model's order; the others are named in a warning.

    Args:
        collector: which ran the model.
        values: layer → value.

    Raises:
        ValueError: no layer is left.
    """
    left_out = collector.left_out
    out = {name: values[name] for name in collector.modules if name in values and name not in left_out}
    if not out:
        name, reason = next(iter(left_out.items()))
        raise ValueError(
            f"expected attention layers of {type(collector.model).__name__} that this probe can read, got none of "
            f"{len(collector.modules)} ({name}: {reason}): see the layer's reason"
        )
    for reason in dict.fromkeys(left_out.values()):
        names = [name for name, own in left_out.items() if own == reason]
        listed = shorten(names)
        warnings.warn(f"{listed} left out: {reason}", ProbeWarning, stacklevel=3)
    return out


def over_tokens(attention: Attention, shape: Sequence[int]) -> None:
    """Leave out a layer whose queries and keys are not the batch's tokens one by one.

    Args:
        attention: one call.
        shape: ``(batch, tokens)``.

    Raises:
        UnsupportedCallError: that is so.
    """
    batch, _, n, m = attention.shape
    if (batch, n, m) != (shape[0], shape[1], shape[1]):
        raise UnsupportedCallError(
            f"its {n} queries and {m} keys of {batch} sequences are not the {shape[1]} tokens of {shape[0]}, so "
            "that no token can be followed"
        )
