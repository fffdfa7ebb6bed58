"""What the arguments of an attention function mean: known of libraries, else found by trial.

A registered function, and each model's own eager one, may use its arguments in any way. So it is called once
more, with its mask and options and with random queries, keys and values of the same shapes, and its output is
compared with softmax attention by each convention in turn. Random
tensors separate conventions that the model's own would not: values may all be alike, logits may be flat.
"""

import math
import sys
import weakref
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import in_evaluation_mode
from lightning_qk.capture.call import AttentionCall, UnreadableFunctionError, UnsupportedCallError
from lightning_qk.capture.conventions import (
    EAGER,
    FLASH,
    FLEX,
    SDPA,
    ArgumentConvention,
    candidates,
    mask_form,
    read_logits,
    sliding_window,
)
from lightning_qk.functional.logits import CHUNK_ELEMENTS
from lightning_qk.functional.precision import full_precision

# Largest relative error of an output row, by the coarsest precision that takes part: several times what rounding
# does to logits of this spread. A wrong convention of one row is off by its whole length.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}
# Standard deviation of the random logits: attention far from uniform, and soft caps of common size are felt.
_LOGIT_STD = 3.0
_ROWS = 16
_MIN_ROWS = 4
# A convention is clearly right where its error is this many times below what is tolerated.
_CLEAR = 50
_REMEDY = 'load the model with attn_implementation="sdpa" or "eager" to have its attention measured'


class _Known(NamedTuple):
    convention: ArgumentConvention
    n: int
    m: int


_known: "weakref.WeakKeyDictionary[nn.Module, dict[Any, _Known]]" = weakref.WeakKeyDictionary()


_LIBRARY = {
    SDPA: ("transformers.integrations.sdpa_attention", "sdpa_attention_forward"),
    FLEX: ("transformers.integrations.flex_attention", "flex_attention_forward"),
}
_BY_NAME = {"eager": EAGER, "sdpa": SDPA, "flex_attention": FLEX}


def convention_of(call: AttentionCall) -> ArgumentConvention:
    """What the arguments of a call mean.

    transformers' own sdpa and flex functions are read as their sources say. Any other function, models' own eager
    ones and flash attention among them, is tried: see :func:`verified_convention`.

    Raises:
        UnsupportedCallError: the function's softmax cannot be reconstructed.
    """
    name = call.implementation
    if name.startswith("paged|") or any(
        call.options.get(key) is not None for key in ("cache", "block_table")
    ):
        raise UnsupportedCallError(
            f"attention implementation {name!r} takes its keys from a paged cache: generate without continuous "
            'batching, or load the model with attn_implementation="sdpa"'
        )
    if call.function is not None:
        for known, (module, attribute) in _LIBRARY.items():
            if call.function is getattr(sys.modules.get(module), attribute, None):
                return known
        return verified_convention(call)
    if name in _BY_NAME:
        return _BY_NAME[name]
    if "flash" in name:
        return FLASH
    raise UnsupportedCallError(
        f"attention implementation {name!r} is not known and its function not at hand: load the model with "
        'attn_implementation="sdpa" or "eager"'
    )


def verified_convention(call: AttentionCall) -> ArgumentConvention:
    """The convention of a call that agrees with what its function returns.

    The function is tried at the first call of each module, again when another kind of mask or option comes, and,
    save for models' own eager functions, again when sequences are longer than any before: a window shows
    only then. Random number generators are left as they were.

    Raises:
        UnsupportedCallError: no known convention agrees, or the function cannot be tried.
    """
    known = _known.setdefault(call.module, {})
    form = _form(call)
    n, m = call.query.shape[2], call.key.shape[2]
    found = known.get(form)
    if found is None or (call.implementation != "eager" and (n > found.n or m > found.m)):
        longest = (n, m) if found is None else (max(n, found.n), max(m, found.m))
        found = _Known(_find(call), *longest)
        known[form] = found
    return found.convention


def _form(call: AttentionCall) -> Any:
    """What decides how a function reads its arguments, apart from their values."""
    mask, options = call.attention_mask, call.options
    scaling = options.get("scaling")
    n, m = call.query.shape[2], call.key.shape[2]
    kind: Any = type(mask)
    if isinstance(mask, Tensor):
        kind = (mask.dim(), mask.is_floating_point())
    flags = tuple(
        (name, value) for name, value in options.items() if isinstance(value, bool) and name != "use_cache"
    )
    given = tuple(name for name, value in options.items() if value is not None)
    starts = options.get("position_ids") if mask is None and call.implementation != "eager" else None
    restarts = None
    if isinstance(starts, Tensor) and starts.shape[0] == 1 and starts.dim() == 2:
        restarts = bool((starts.diff() != 1).any())
    return (
        id(call.function),
        kind,
        (n == 1, n == m, n < m),
        flags,
        given,
        restarts,
        None if isinstance(scaling, Tensor) else scaling,
        sliding_window(call),
    )


def _find(call: AttentionCall) -> ArgumentConvention:
    trial = _trial(call)
    errors, best, tolerance = _tried(trial, call)
    if best > tolerance and call.module.training:
        # A function with a dropout of its own: that of the arguments is 0 already.
        with in_evaluation_mode(call.module):
            errors, best, tolerance = _tried(trial, call)
    if best > tolerance:
        raise UnreadableFunctionError(
            f"the output of attention function {_name(call)} is not softmax attention of the query, key and mask "
            f"that it received ({mask_form(call.attention_mask)}): {_REMEDY}"
        )
    # The likeliest of those that fit about as well as the best one does.
    enough = min(tolerance, max(4 * best, tolerance / _CLEAR))
    return next(convention for error, convention in errors if error <= enough)


def _name(call: AttentionCall) -> str:
    own = getattr(call.function, "__qualname__", type(call.function).__name__)
    return f"{call.implementation!r} ({own})"


def _trial(call: AttentionCall) -> AttentionCall:
    """The call with random tensors, copies of what else it got, and without dropout."""
    if not isinstance(call.value, Tensor) or call.value.dim() != 4 or call.query.dim() != 4:
        raise UnsupportedCallError(
            f"attention function {_name(call)}: expected query and value of four dimensions, got "
            f"{tuple(call.query.shape)} and {tuple(getattr(call.value, 'shape', ()))}: {_REMEDY}"
        )
    device = call.query.device
    generator = torch.Generator(device).manual_seed(0)

    def random(like: Tensor, std: float) -> Tensor:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        drawn = torch.randn(like.shape, generator=generator, device=device, dtype=dtype)
        return drawn.mul_(std).to(like.dtype)

    d_head = call.query.shape[-1]
    scaling = call.options.get("scaling")
    scaling = d_head**-0.5 if not isinstance(scaling, int | float) or scaling == 0 else abs(scaling)
    std = (_LOGIT_STD / (scaling * d_head**0.5)) ** 0.5
    # Copies: a function may write into what it gets, and the model's own call is still to come.
    options = {name: _copy(value) for name, value in call.options.items()}
    if "dropout" in options:
        options["dropout"] = 0.0
    return call._replace(
        query=random(call.query, std),
        key=random(call.key, std),
        value=random(call.value, 1.0),
        attention_mask=_left_padded(_copy(call.attention_mask)),
        options=options,
    )


def _left_padded(mask: Any) -> Any:
    """The mask with the first quarter of the first sequence hidden, as padding is.

    A mask that hides nothing, or no more than causality does, would not show whether the function uses it.
    """
    if isinstance(mask, Tensor) and mask.dim() in (2, 4):
        hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
        if mask.dim() == 4 or not mask.is_floating_point():
            mask[:1, ..., : mask.shape[-1] // 4] = hidden
    return mask


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _run(trial: AttentionCall, call: AttentionCall) -> tuple[Any, float]:
    """What the function returns, and the error that rounding may put into it."""
    kind = trial.query.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    assert trial.function is not None  # else there is nothing to try
    with (
        torch.no_grad(),
        full_precision(trial.query.device),
        # As the model has it: some functions cast to autocast's dtype themselves.
        torch.autocast(kind, dtype=autocast, enabled=autocast is not None),
        _random_state_kept(trial.query.device),
    ):
        try:
            output = trial.function(
                trial.module, trial.query, trial.key, trial.value, trial.attention_mask, **trial.options
            )
        except Exception as error:
            what = next(iter(str(error).splitlines()), "")
            raise UnreadableFunctionError(
                f"attention function {_name(call)} could not be tried on random tensors "
                f"({type(error).__name__}: {what}): {_REMEDY}"
            ) from error
    if isinstance(output, tuple | list) and output:
        output = output[0]
    dtypes = [trial.query.dtype, autocast, getattr(output, "dtype", None)]
    return output, max(_TOLERANCE[dtype] for dtype in dtypes if dtype in _TOLERANCE)


def _tried(
    trial: AttentionCall, call: AttentionCall
) -> tuple[list[tuple[float, ArgumentConvention]], float, float]:
    """Each convention's largest relative error of a row, up to the first that is clearly right; the least one.

    The last number is the error that rounding may put into what the function returns.
    """
    output, tolerance = _run(trial, call)
    errors: list[tuple[float, ArgumentConvention]] = []
    layouts = _layouts(trial, output)
    for convention in candidates(trial) if layouts else ():
        try:
            error = min(_row_error(trial, convention, layout) for layout in layouts)
        except (UnsupportedCallError, ValueError):
            continue  # a convention that does not know such a mask
        errors.append((error, convention))
        if error <= tolerance / _CLEAR:
            break
    return errors, min((error for error, _ in errors), default=math.inf), tolerance


def _layouts(trial: AttentionCall, output: Any) -> list[Tensor]:
    """The output as ``(batch, n, heads, d_value)``, in every way that its shape allows."""
    batch, heads, n, _ = trial.query.shape
    shape = (batch, n, heads, trial.value.shape[-1])
    if not isinstance(output, Tensor) or output.numel() != math.prod(shape):
        return []
    if output.dim() != 4:
        return [output.reshape(shape)]
    layouts = [output, output.transpose(1, 2)]
    return [layout for layout in layouts if tuple(layout.shape) == shape]


def _row_error(trial: AttentionCall, convention: ArgumentConvention, output: Tensor) -> float:
    """Largest relative error of some rows of the output against softmax attention by a convention."""
    with full_precision(trial.query.device), torch.no_grad():
        logits, value = read_logits(trial, convention, self_attention=None)
        logits = logits.wide()
        valid = logits.counted().rows
        batch, heads, n, _ = logits.query.shape
        kv_heads, m = logits.key.shape[1:3]
        count = max(_MIN_ROWS, min(_ROWS, CHUNK_ELEMENTS // max(1, batch * heads * m)))
        # Evenly over the valid rows of each sequence, the first and the last among them.
        rank = torch.linspace(0, 1, count, device=valid.device) * (valid.sum(1, keepdim=True) - 1)
        order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
        index = order.gather(1, rank.round().long().clamp_min(0))
        used = valid.gather(1, index)[:, None].expand(batch, heads, count)
        if not bool(used.any()):
            return math.inf
        chunk = logits.chunk(index, logits.buffer(count))
        weights = chunk.logits
        if chunk.shown is not None:
            weights = weights.masked_fill(chunk.shown == 0, -math.inf)
        if logits.sinks is not None:
            sinks = logits.sinks.to(weights.dtype).view(1, heads, 1, 1).expand(batch, heads, count, 1)
            weights = torch.cat([weights, sinks], dim=-1)
        weights = weights.softmax(-1)[..., :m]
        grouped = weights.reshape(batch, kv_heads, -1, m) @ value.to(weights.dtype)
        expected = grouped.reshape(batch, heads, count, -1)
        where = index[:, :, None, None].expand(-1, -1, heads, output.shape[-1])
        got = output.reshape(batch, n, heads, -1).gather(1, where).transpose(1, 2).to(expected.dtype)
        error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
        error = torch.where(used, error, 0.0).amax()
    return math.inf if error.isnan() else float(error)


def _random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    if device.type in ("cpu", "mps", "meta"):
        return torch.random.fork_rng(devices=[])
    index = torch.get_device_module(device).current_device() if device.index is None else device.index
    return torch.random.fork_rng(devices=[index], device_type=device.type)
