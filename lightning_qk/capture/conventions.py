"""Argument conventions: what attention functions mean by their mask, flags and other arguments.

The implementations of transformers have the conventions of their sources; for other functions
:mod:`lightning_qk.capture.verify` tries those that :func:`candidates` lists.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qk.capture.call import AttentionCall, UnsupportedCallError
from lightning_qk.capture.masks import block_mask_function, packed_function, padded_function
from lightning_qk.functional.chunks import MASKED_BELOW, MaskFunction
from lightning_qk.functional.logits import AttentionLogits, ProductLogits


class ArgumentConvention(NamedTuple):
    """What the arguments of an attention function mean.

    Attributes:
        visibility: which keys are seen, a key of :data:`_VISIBILITY`.
        scaling: the ``scaling`` argument is used; else ``d_head ** -0.5`` is.
        softcap: the ``softcap`` argument is used.
        bias: the ``position_bias`` argument is used.
        sinks: learnt sinks are used.
        window: the ``sliding_window`` argument is used.
    """

    visibility: str
    scaling: bool = True
    softcap: bool = True
    bias: bool = True
    sinks: bool = True
    window: bool = False


EAGER = ArgumentConvention("added")
# transformers' function ignores what torch's does not know; a soft cap it refuses.
SDPA = ArgumentConvention("sdpa", softcap=False, sinks=False)
FLEX = ArgumentConvention("flex")
FLASH = ArgumentConvention("flash", window=True)


class VisibleKeys(NamedTuple):
    """Which keys each query sees.

    Attributes:
        query: ``(batch, heads, n, d_head)``; all sequences in one row where they are packed.
        key: ``(batch, kv_heads, m, d_head)``, cut where the function cuts it.
        value: likewise.
        mask: boolean, additive or a function.
        is_causal: whether row i sees the keys up to ``query_offset + i`` only.
        sliding_window: how near the keys that are seen are.
        query_offset: place of the first query among the keys; None: to be found.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | MaskFunction | None = None
    is_causal: bool = False
    sliding_window: int | None = None
    query_offset: int | None = None


_See = Callable[[AttentionCall, int | None], VisibleKeys]
"""Call and window → which keys are seen."""


def visible_keys(call: AttentionCall, convention: ArgumentConvention) -> VisibleKeys:
    """Which keys the queries of a call see.

    Raises:
        UnsupportedCallError: the mask is not of a form that the convention knows.
    """
    return _VISIBILITY[convention.visibility](call, sliding_window(call) if convention.window else None)


def read_logits(
    call: AttentionCall, convention: ArgumentConvention, *, self_attention: bool | None
) -> tuple[ProductLogits, Tensor]:
    """The logits of a call by a convention, with gradients, and the value of their keys.

    Raises:
        UnsupportedCallError: the mask is not of a form that the convention knows.
    """
    seen = visible_keys(call, convention)
    options = call.options
    bias = options.get("position_bias") if convention.bias else None
    sinks = learnt_sinks(call, module=convention.visibility != "flex") if convention.sinks else None
    logits = AttentionLogits.of(
        seen.query,
        seen.key,
        mask=seen.mask,
        is_causal=seen.is_causal,
        scaling=options.get("scaling") if convention.scaling else None,
        sliding_window=seen.sliding_window,
        softcap=soft_cap(call) if convention.softcap else None,
        bias=bias[..., : seen.key.shape[2]] if isinstance(bias, Tensor) else None,
        sinks=sinks,
        query_offset=position_offset(seen, self_attention),
        self_attention=self_attention,
    )
    return logits, seen.value


def position_offset(seen: VisibleKeys, self_attention: bool | None) -> int:
    """Place of the first query among the keys."""
    if seen.query_offset is not None:
        return seen.query_offset
    n, m = seen.query.shape[2], seen.key.shape[2]
    if n >= m or not self_attention:
        return 0
    # With a cache the queries are the newest of the keys' tokens; a static cache is longer than what it holds.
    if seen.mask is None:
        return m - n
    device = seen.key.device
    if isinstance(seen.mask, Tensor):
        row = seen.mask[..., -1, :]
        row = row if row.dtype == torch.bool else row > MASKED_BELOW
    else:
        batch, heads = (torch.arange(size, device=device) for size in seen.query.shape[:2])
        last = torch.full((1, 1, 1, 1), n - 1, device=device)
        row = seen.mask(
            batch[:, None, None, None], heads[:, None, None], last, torch.arange(m, device=device)
        )
    newest = (row.reshape(-1, m).any(0) * torch.arange(1, m + 1, device=device)).amax()
    return min(max(int(newest) - n, 0), m - n)


def learnt_sinks(call: AttentionCall, *, module: bool = True) -> Tensor | None:
    """One logit a head, from the arguments or, where asked, the module."""
    sinks = call.options.get("s_aux")
    if sinks is None and module:
        sinks = getattr(call.module, "sinks", None)
    return sinks if isinstance(sinks, Tensor) else None


def soft_cap(call: AttentionCall) -> float | None:
    """The bound that the function is to put on the logits; None for none, which flash attention writes as 0."""
    return call.options.get("softcap") or None


def sliding_window(call: AttentionCall) -> int | None:
    """The window by the function's arguments, or by its module's attribute."""
    if "sliding_window" in call.options:
        window = call.options["sliding_window"]
    else:
        window = getattr(call.module, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


def is_block_mask(mask: Any) -> bool:
    """Whether a mask is flex_attention's, without importing it."""
    return all(hasattr(mask, name) for name in ("mask_mod", "kv_num_blocks", "kv_indices", "BLOCK_SIZE"))


def mask_form(mask: Any) -> str:
    """A mask in words, for errors."""
    if mask is None:
        return "no mask"
    if isinstance(mask, Tensor):
        return f"a mask {tuple(mask.shape)} of {mask.dtype}"
    return f"a {type(mask).__name__}"


def _refuse(call: AttentionCall, expected: str, remedy: str) -> UnsupportedCallError:
    return UnsupportedCallError(
        f"attention implementation {call.implementation!r}: expected {expected}, got "
        f"{mask_form(call.attention_mask)}: {remedy}"
    )


def _lengths(call: AttentionCall) -> tuple[int, int]:
    return call.query.shape[2], call.key.shape[2]


def _is_causal(call: AttentionCall) -> bool:
    """By the flag, else by the module."""
    asked = call.options.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if asked is None else asked)


def _check(call: AttentionCall, mask: Tensor, n: int, m: int) -> Tensor:
    """The mask, if it broadcasts to ``(batch, heads, n, m)``."""
    full = (*call.query.shape[:2], n, m)
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if mask.dim() > 4 or any(have not in (1, want) for have, want in zip(shape, full, strict=True)):
        raise _refuse(
            call,
            f"a mask that broadcasts to (batch, heads, n, m) = {full}",
            "pass the model a mask of two dimensions (batch, m) and let it build its own",
        )
    return mask


def _visible(
    call: AttentionCall,
    m: int,
    *,
    mask: Tensor | MaskFunction | None = None,
    is_causal: bool = False,
    window: int | None = None,
    offset: int | None = None,
) -> VisibleKeys:
    """The masks of the first m keys."""
    key = call.key[:, :, :m]
    # A call whose function is not tried may lack values.
    value = call.value[:, :, :m] if isinstance(call.value, Tensor) else call.value
    return VisibleKeys(call.query, key, value, mask, is_causal, window, offset)


def _added(call: AttentionCall, window: int | None) -> VisibleKeys:
    """A floating mask added to the logits, wider than the keys at times; without one, all keys are seen."""
    n, m = _lengths(call)
    mask = call.attention_mask
    if mask is not None:
        if not isinstance(mask, Tensor) or not mask.is_floating_point() or mask.dim() != 4:
            raise _refuse(
                call,
                "an additive floating mask (batch, heads, n, m)",
                'pass the model a mask of two dimensions (batch, m), or load it with attn_implementation="sdpa"',
            )
        mask = _check(call, mask[..., :m], n, m)
    return _visible(call, m, mask=mask, window=window)


def _sdpa(call: AttentionCall, window: int | None) -> VisibleKeys:
    """A boolean mask of what to keep or an additive one; without one, the flag, else the module decides."""
    n, m = _lengths(call)
    mask = call.attention_mask
    if mask is None:
        is_causal = _is_causal(call) and n > 1
        # A causal call whose keys are more than its queries sees the first ones: an empty static cache.
        m = min(n, m) if is_causal else m
        return _visible(call, m, is_causal=is_causal, window=window, offset=0 if is_causal else None)
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise _refuse(
            call,
            "a boolean mask (True = keep) or an additive floating one",
            "convert a mask of zeros and ones with .bool()",
        )
    return _visible(call, m, mask=_check(call, mask, n, m), window=window)


def _kept(call: AttentionCall, window: int | None) -> VisibleKeys:
    """Ones (or True) of a mask of four dimensions are kept."""
    n, m = _lengths(call)
    mask = call.attention_mask
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.is_floating_point():
        raise _refuse(call, "a mask of zeros and ones", "pass a boolean mask")
    return _visible(call, m, mask=_check(call, mask.bool()[..., :m], n, m), window=window)


def _flex(call: AttentionCall, window: int | None) -> VisibleKeys:
    """A BlockMask, or a tensor added to the logits of which the first head counts; without one, no mask."""
    n, m = _lengths(call)
    mask = call.attention_mask
    if mask is None:
        return _visible(call, m)
    if isinstance(mask, Tensor):
        return _added(call._replace(attention_mask=mask[:, :1] if mask.dim() == 4 else mask), None)
    if not is_block_mask(mask):
        raise _refuse(call, "a BlockMask or an additive floating mask (batch, heads, n, m)", "pass one")
    blocks = tuple(mask.shape[-2:])
    if blocks[0] < n or blocks[1] < m:
        raise _refuse(call, f"a BlockMask of at least {(n, m)}", f"build it for these lengths, not {blocks}")
    return _visible(call, m, mask=block_mask_function(mask))


def _flash(call: AttentionCall, window: int | None) -> VisibleKeys:
    """A padding mask of two dimensions or none; windows by argument; packed sequences by their positions.

    Causality is aligned to the last query and the last key. A window shows fewer than so many places to both
    sides. Padding is taken out before anything else.
    """
    n, m = _lengths(call)
    mask, is_causal = call.attention_mask, _is_causal(call)
    _refuse_chunks(call, m)
    if window is not None and window >= m:
        window = None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point():
            raise _refuse(
                call, "a padding mask (batch, m) of ones and zeros", "let the model build its own from it"
            )
        if mask.shape[0] != call.query.shape[0] or not n <= mask.shape[1] <= m:
            raise _refuse(call, f"a padding mask of {(call.query.shape[0], m)}", "pass the mask of all keys")
        m = mask.shape[1]  # a static cache is longer
        keep = mask.bool()
        return _visible(call, m, mask=padded_function(keep, n, is_causal=is_causal, sliding_window=window))
    starts = _packing(call)
    if starts is not None:
        query, key, value = (
            tensor.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)
            for tensor in (call.query, call.key, call.value)
        )
        packed = packed_function(
            *starts, query.shape[2], key.shape[2], is_causal=is_causal, sliding_window=window
        )
        return VisibleKeys(query, key, value, mask=packed, query_offset=0)
    if not is_causal and window is None:
        return _visible(call, m)
    if is_causal and _is_top_left():
        is_causal, offset = n > 1, 0
    else:
        offset = m - n
    return _visible(call, m, is_causal=is_causal, window=window, offset=offset)


def _is_top_left() -> bool:
    """Whether this machine's flash attention aligns causality to the first query and key, as old ones do."""
    from transformers.integrations import flash_attention

    return bool(getattr(flash_attention, "_use_top_left_mask", False))


def _packing(call: AttentionCall) -> tuple[Tensor, Tensor] | None:
    """Where packed sequences of queries and of keys start and end; None: they are not packed."""
    options = call.options
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    if all(options.get(name) is not None for name in names):
        return options["cu_seq_lens_q"], options["cu_seq_lens_k"]
    positions = options.get("position_ids")
    if not isinstance(positions, Tensor) or call.query.shape[0] != 1:
        return None
    # The very functions that transformers decides with: what counts as packed differs between its versions.
    from transformers.modeling_flash_attention_utils import (
        _is_packed_sequence,
        prepare_fa_kwargs_from_position_ids,
    )

    if not _is_packed_sequence(positions, 1):
        return None
    return prepare_fa_kwargs_from_position_ids(positions)[0]


def _refuse_chunks(call: AttentionCall, m: int) -> None:
    config = getattr(call.module, "config", None)
    chunk = getattr(config, "attention_chunk_size", None)
    if not isinstance(chunk, int) or m <= chunk:
        return
    kinds, index = getattr(config, "layer_types", None), getattr(call.module, "layer_idx", None)
    if kinds is None or index is None or kinds[index] == "chunked_attention":
        raise UnsupportedCallError(
            f"attention implementation {call.implementation!r} gets no argument for where chunks of {chunk} keys "
            f'begin, which {m} keys exceed: load the model with attn_implementation="sdpa"'
        )


def _nothing_hidden(call: AttentionCall, window: int | None) -> VisibleKeys:
    """Whatever mask there is, all keys are seen."""
    n, m = _lengths(call)
    return _visible(call, m, window=window, offset=m - n if window is not None else None)


def _causal_from_start(call: AttentionCall, window: int | None) -> VisibleKeys:
    """Whatever mask there is, query i sees the keys up to i."""
    m = min(_lengths(call))
    return _visible(call, m, is_causal=True, window=window, offset=0)


def _masked(call: AttentionCall, window: int | None) -> VisibleKeys:
    """A mask of four dimensions, added or of what to keep."""
    mask = call.attention_mask
    return (_added if isinstance(mask, Tensor) and mask.is_floating_point() else _kept)(call, window)


def _padding(call: AttentionCall, window: int | None) -> VisibleKeys:
    """Ones of a mask (batch, m) are kept."""
    n, m = _lengths(call)
    mask = call.attention_mask
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != call.query.shape[0]:
        raise _refuse(call, "a padding mask (batch, m)", "pass one")
    mask = _check(call, mask[:, None, None, :m].bool(), n, m)
    return _visible(call, m, mask=mask, window=window, offset=None if window is None else m - n)


def _causal(see: _See, call: AttentionCall, window: int | None) -> VisibleKeys:
    """With causality of the function's own, aligned to the last query and key."""
    n, m = _lengths(call)
    return see(call, window)._replace(is_causal=True, query_offset=m - n)


_VISIBILITY: dict[str, _See] = {
    "added": _added,
    "sdpa": _sdpa,
    "kept": _kept,
    "flex": _flex,
    "flash": _flash,
    "nothing hidden": _nothing_hidden,
    "causal from start": _causal_from_start,
    "causal to end": partial(_causal, _nothing_hidden),
    "masked, causal": partial(_causal, _masked),
    "padding": _padding,
    "padding, causal": partial(_causal, _padding),
}
_WITHOUT_MASK = ("nothing hidden", "causal from start", "causal to end")


def candidates(call: AttentionCall) -> Iterator[ArgumentConvention]:
    """Conventions worth trying for a function of unknown meaning, the likeliest first."""
    mask = call.attention_mask
    kinds: tuple[str, ...]
    if mask is None:
        kinds = ("sdpa", "flash", *_WITHOUT_MASK)
        if call.implementation == "eager":
            kinds = ("nothing hidden", "sdpa", *_WITHOUT_MASK[1:])
    elif is_block_mask(mask):
        kinds = ("flex", *_WITHOUT_MASK)
    elif not isinstance(mask, Tensor):
        kinds = _WITHOUT_MASK
    elif mask.dim() == 2:
        kinds = ("flash", "padding", "padding, causal", "sdpa", *_WITHOUT_MASK)
    elif mask.is_floating_point():
        kinds = ("added", "masked, causal", "sdpa", *_WITHOUT_MASK)
    else:
        kinds = ("kept", "masked, causal", "sdpa", *_WITHOUT_MASK)
    d_head = call.query.shape[-1]
    scaling = call.options.get("scaling")
    window = sliding_window(call)
    has_window = window is not None and window < call.key.shape[2]
    sinks = learnt_sinks(call)
    choices = [
        (True,) if scaling is None or abs(scaling * d_head**0.5 - 1) < 1e-6 else (True, False),
        (True,) if soft_cap(call) is None else (True, False),
        (True,) if call.options.get("position_bias") is None else (True, False),
        (False,) if sinks is None or sinks.numel() != call.query.shape[1] else (True, False),
    ]
    for kind in kinds:
        windows = (False,) if not has_window else (True, False) if kind == "flash" else (False, True)
        for chosen in itertools.product(*choices, windows):
            yield ArgumentConvention(kind, *chosen)
