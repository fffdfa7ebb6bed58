"""Row statistics of attention by one launch on the device instead of chunk by chunk, where a kernel fits."""

import importlib.util
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional.chunks import MASKED_BELOW
from lightning_qk.functional.logits import AttentionLogits, ProductLogits
from lightning_qk.functional.visibility import evaluate_mask

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Registers and shared memory hold a block of vectors whole.
_MAX_D_HEAD = 256
# Float32 holds squares of logits between these. Beyond them, and for what keys receive in half precisions beyond
# the last, where the logits' own rounding decides, numbers become NaN: checking the size would synchronize.
_SMALLEST, _LARGEST, _LARGEST_HALF = 1e-15, 1e18, 1e5
_broken: set[torch.device] = set()


class Collected(NamedTuple):
    """Statistics of the rows of a call, before averaging.

    Attributes:
        values: each statistic of each row, shape ``(len(ROW_STATISTICS), batch, heads, rows)``.
        counted: which of them count, boolean, same shape.
        maximum: of each sequence and head, ``(len(EXTREMES), batch, heads)``.
        received: probability that each key receives, summed over the rows, ``(batch, heads, keys)``.
        received_sq: the sum of its squares, same shape; filled only for sampled rows.
        seen: how many rows see each key, same shape.
    """

    values: Tensor
    counted: Tensor
    maximum: Tensor
    received: Tensor
    received_sq: Tensor
    seen: Tensor


class Wanted(NamedTuple):
    """What takes more than the one sweep over q·kᵀ that gives all other statistics; NaN where it is not asked for.

    Attributes:
        linear_share: it is relative to a row's mean, which comes first.
        sink_rate: what keys receive takes the finished softmax of every row.
    """

    linear_share: bool = True
    sink_rate: bool = True


class Blocks(NamedTuple):
    """Shape of a launch: rows and keys of a tile, warps, and blocks that are loaded ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


def kernel_rows(
    source: AttentionLogits, used: Tensor, index: Tensor | None, wanted: Wanted | None = None
) -> Collected | None:
    """The rows of a call by a kernel; None where no kernel fits: on the CPU, without triton, in float64, all rows
    of a mask that is a function, or of given logits. If the kernel cannot be built, a warning says why,
    once, and None is returned.

    Args:
        source: query and key in the precision that they came in.
        used: rows that count, ``(batch, rows)``.
        index: which rows these are, ``(batch, rows)``; None for all.
        wanted: None for all statistics.
    """
    device = source.device
    if not isinstance(source, ProductLogits) or not source.query.is_cuda or device in _broken:
        return None
    if not fits(source, index):
        return None
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return None
    try:
        with torch.cuda.device(device):
            return launch(source, used, index, every=source.every_row_counts, wanted=wanted)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _broken.add(device)
        reason = (str(error).strip() or "no message").splitlines()[-1]
        warnings.warn(
            f"attention statistics on {device} go on without their Triton kernel, slower and with the same "
            f"results, since it could not be run ({type(error).__name__}: {reason}): triton >= 3.2 and a C "
            "compiler are what it takes",
            stacklevel=2,
        )
        return None


def fits(source: ProductLogits, index: Tensor | None = None) -> bool:
    """Whether dtypes, sizes and the form of the mask are among those that the kernel takes.

    A mask that is a function is evaluated for the rows of an index.
    """
    batch, heads, n, d_head = source.query.shape
    return (
        source.query.dtype in _FLOATS
        and source.key.dtype in _FLOATS
        and (source.mask is None or isinstance(source.mask, Tensor) or index is not None)
        and min(batch, heads, n, source.key.shape[2], d_head) > 0
        and d_head <= _MAX_D_HEAD
        and batch * heads < 1 << 16  # the second dimension of a grid
        and max(n, source.key.shape[2]) + abs(source.query_offset) < 1 << 24  # exact in float32
    )


def launch_shapes(
    dtype: torch.dtype,
    d_head: int,
    capability: tuple[int, int],
    *,
    is_simple: bool,
    is_loaded: bool,
    sampled: int | None = None,
) -> tuple[Blocks, Blocks]:
    """Launch shapes of the kernel of rows and the kernel of keys.

    A table rather than a search while training runs, which would synchronize the device. The compiler finds
    registers for nearly all of it: ``benchmarks/registers.py`` says what it spills.

    Args:
        dtype: of queries and keys.
        d_head: their width.
        capability: of the device, such as (9, 0).
        is_simple: a causal call whose mean logits come of sums of keys; others keep more numbers at a time.
        is_loaded: a mask or a bias is loaded for every logit.
        sampled: number of sampled rows; None: all of them.
    """
    wide = d_head > 128
    if dtype == torch.float32:  # without tensor cores: small tiles, for the registers of the products
        by_row, by_key = Blocks(32, 32, 4, 2), Blocks(16, 32, 8, 1) if wide else Blocks(32, 32, 8, 2)
    # A100, H100, B200 and the like have 160 KiB of shared memory and more, other GPUs 64 to 99 KiB.
    elif capability not in ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3)):
        small = Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2)
        by_row, by_key = small if wide else (Blocks(64, 64, 4, 2),) * 2
    elif wide:
        by_row, by_key = Blocks(64, 64, 8, 2), Blocks(64, 64, 4, 2)
    else:
        by_row, by_key = Blocks(128, 64 if is_simple else 32, 8, 3), Blocks(64, 128, 4, 3)
    if is_loaded and by_row.rows > 32:
        # Of larger tiles more than a kilobyte a thread would be spilt.
        by_row = Blocks(64, 32, 8, 2)
    if sampled is not None:
        # Few rows: small blocks, for enough programs to fill the device.
        by_row = by_row._replace(rows=min(by_row.rows, 16 if sampled <= 256 else 64), warps=4)
        by_key = by_key._replace(rows=min(by_key.rows, max(16, _power_of_two(sampled))))
    return by_row, by_key


def launch(
    source: ProductLogits,
    used: Tensor,
    index: Tensor | None,
    *,
    every: bool,
    wanted: Wanted | None = None,
    shapes: tuple[Blocks, Blocks] | None = None,
) -> Collected:
    """Run the kernels on any device, with the arguments of :func:`kernel_rows`.

    ``every``: ``used`` is known to be all True; ``shapes``: in place of those of :func:`launch_shapes`.
    """
    from lightning_qk.functional import _triton_keys, _triton_rows, _triton_tiles

    wanted = wanted or Wanted()
    query, key = source.query, source.key
    if query.dtype != key.dtype:
        query, key = query.float(), key.float()
    scaling = source.scaling
    batch, heads, n, d_head = query.shape
    kv_heads, m = key.shape[1:3]
    rows = n if index is None else index.shape[1]
    lines = batch * heads
    device = query.device
    wide = max(16, _power_of_two(d_head))

    mask, bias = source.mask, source.bias
    own_mask = False
    if mask is not None and not isinstance(mask, Tensor):
        own_mask = True
        assert index is not None  # it fits
        mask = evaluate_mask(mask, (batch, heads), index, slice(0, m), device)
    step = _strides(mask)
    kind = 0
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        if kind == 1:
            mask = mask.view(torch.uint8)
    plain = kind == 0 and bias is None and source.softcap is None
    is_prefix = wanted.linear_share and plain and source.sliding_window is None and index is None
    by_row, by_key = shapes or launch_shapes(
        query.dtype,
        d_head,
        torch.cuda.get_device_capability(device) if query.is_cuda else (9, 0),
        is_simple=is_prefix and source.is_causal,
        is_loaded=kind != 0 or bias is not None,
        sampled=None if index is None else rows,
    )
    log2e = math.log2(math.e)
    position = {
        "heads": heads,
        "group": heads // kv_heads,
        "rows": rows,
        "m": m,
        "offset": source.query_offset,
        "window": source.sliding_window or 0,
        "scale": scaling * log2e if source.softcap is None else scaling / source.softcap,
        "cap": 0.0 if source.softcap is None else source.softcap * log2e,
        "masked_below": MASKED_BELOW,
        "JOINT": query.dtype != torch.float32,
        "D": d_head,
        "BLOCK_D": wide,
        "CAUSAL": source.is_causal,
        "WINDOW": source.sliding_window is not None,
        "SOFTCAP": source.softcap is not None,
        "BIAS": bias is not None,
        "MASK": kind,
        "INDEX": index is not None,
        "OWN_MASK": own_mask,
        # Triton's interpreter, the only way to get here without a GPU, multiplies the bits of bfloat16.
        "PRECISION": "ieee" if query.dtype == torch.float32 or not query.is_cuda else "tf32",
    }
    strides = (*query.stride(), *key.stride(), *_strides(bias), *_strides(mask))

    prefix = query
    if is_prefix:
        number = -(-m // by_row.keys)
        prefix = torch.zeros(batch * kv_heads, number + 1, wide, device=device)
        _triton_rows.sums_kernel[number, batch * kv_heads](
            key, prefix, *key.stride(), kv_heads, m, D=d_head, BLOCK_N=by_row.keys, BLOCK_D=wide
        )
        prefix = prefix.cumsum(1)
    places = query if index is None else index.contiguous()
    sinks = query if source.sinks is None else source.sinks.float().reshape(-1).contiguous()

    def reach(by: Blocks, *, of_keys: bool) -> tuple[Tensor, dict[str, int]]:
        """Where blocks see anything by the mask, and its strides."""
        if mask is None or index is not None:
            return query, {"reach_b": 0, "reach_h": 0}
        size = n, m
        edges, axes = (by.rows, by.keys), (step[2], step[3])
        if of_keys:
            size, edges, axes = size[::-1], edges[::-1], axes[::-1]
        lines = mask.shape[:2]
        found = torch.empty(*lines, -(-size[0] // edges[0]), 2, dtype=torch.int32, device=device)
        _triton_tiles.reach_kernel[found.shape[2], lines[0] * lines[1]](
            mask, found, *step[:2], *axes, lines[1], *size, MASKED_BELOW,
            MASK=kind, BLOCK_I=edges[0], BLOCK_J=edges[1],
        )  # fmt: skip
        return found, dict(zip(("reach_b", "reach_h"), _strides(found), strict=False))

    values = torch.empty(13, batch, heads, rows, device=device)
    state = torch.empty(4, batch, heads, rows, device=device)
    found, places_of = reach(by_row, of_keys=False)
    _triton_rows.rows_kernel[-(-rows // by_row.rows), lines](
        query, key, prefix, places, used.contiguous().view(torch.uint8), query if bias is None else bias,
        query if mask is None else mask, found, sinks, values, state, *strides, **places_of, **position,
        BLOCK_M=by_row.rows, BLOCK_N=by_row.keys, SINKS=source.sinks is not None, PREFIX=is_prefix,
        LINEAR=wanted.linear_share,
        num_warps=by_row.warps, num_stages=by_row.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    out = torch.full((3, batch, heads, m), math.nan, device=device)
    if wanted.sink_rate:
        found, places_of = reach(by_key, of_keys=True)
        _triton_keys.keys_kernel[-(-m // by_key.keys), lines](
            query, key, places, query if bias is None else bias, query if mask is None else mask, found, state,
            out, *strides, **places_of, **position, BLOCK_M=by_key.rows, BLOCK_N=by_key.keys, EVERY=every,
            num_warps=by_key.warps, num_stages=by_key.stages,
            enable_fp_fusion=True,
        )  # fmt: skip

    counted = values[11].bool().expand(11, -1, -1, -1).clone()
    counted[1] = values[12].bool()
    if source.sinks is None:
        counted[9] = False
    top = state[2].amax(-1)
    maximum = torch.stack([top, torch.maximum(top, -state[3].amin(-1))])
    received, received_sq = out[0], out[2] if index is not None else torch.zeros_like(out[0])
    size = maximum[1]
    known = size != -math.inf
    values = values[:11].masked_fill_((known & ~(size <= _LARGEST))[..., None], math.nan)
    values[4].masked_fill_((known & (size != 0) & (size < _SMALLEST))[..., None], math.nan)
    exact = size <= (_LARGEST if query.dtype == torch.float32 else _LARGEST_HALF)
    received.masked_fill_((known & ~exact)[..., None], math.nan)
    return Collected(values, counted, maximum, received, received_sq, out[1])


def _strides(tensor: Any) -> tuple[int, ...]:
    """Strides of a broadcast tensor, 0 where it has one entry for all."""
    if tensor is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
