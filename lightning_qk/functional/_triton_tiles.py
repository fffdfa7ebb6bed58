"""Tiles of q·kᵀ in Triton: what the kernels of rows and of keys share.

Imported only when a kernel is launched, since the package needs triton nowhere else.

Logits are kept in units of log 2: ``exp2`` takes them as they are. Where the linear share is asked for, they are
relative to their row's mean, one multiply-add from the product: their square gives the variance, and their
comparison with one threshold the share.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below any logit relative to its mean whose statistics are kept (_LARGEST in _kernel.py), and finite, so that
# its product with 0 is 0.
FAR = tl.constexpr(-1e30)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def load(pointer, i, d, stride_i, stride_d, end, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """Vectors number ``i`` (0 from ``end`` on) of a matrix; ``i`` and ``d`` broadcast to the tile's shape."""
    place = pointer + i * stride_i + d * stride_d
    if CHECK or (BLOCK_D != D):
        return tl.load(place, mask=(i < end) & (d < D), other=0.0)
    else:
        return tl.load(place)


@triton.jit
def product_of(a, b, PRECISION: tl.constexpr):
    """Product of two tiles; half precisions are multiplied exactly and summed in float32."""
    if PRECISION == "ieee":
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def logits_of(
    product, i, j, position, row, end_i, end_j, window, scale, cap,
    bias, bias_i, bias_j, mask, mask_i, mask_j, masked_below,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Logits over log 2 and visibility of a tile; its places broadcast, ``row`` is that of the mask."""
    shown = (i < end_i) & (j < end_j)
    x = product * scale
    if SOFTCAP:
        decay = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        x = tl.where(x < 0, -cap, cap) * ((1 - decay) / (1 + decay))
    if BIAS:
        at = i.to(tl.int64) * bias_i + j.to(tl.int64) * bias_j
        x += tl.load(bias + at, mask=shown, other=0.0).to(tl.float32) * LOG2E
    if MASK != 0:
        at = row.to(tl.int64) * mask_i + j.to(tl.int64) * mask_j
        value = tl.load(mask + at, mask=shown, other=0)
        if MASK == 1:
            shown = shown & (value != 0)
        else:
            value = value.to(tl.float32)
            shown = shown & (value > masked_below)
            x += tl.where(shown, value, 0.0) * LOG2E
    if CAUSAL:
        shown = shown & (j <= position)
    if WINDOW:
        shown = shown & (tl.abs(j - position) < window)
    return x, shown


@triton.jit
def merge(v, w, u, reference, top, new, part, square, energy, anchor, travelled, spread):
    """Take a block into the running sums of its rows.

    Args:
        v: logits relative to ``new``.
        w: ``exp2(v)``; 0 where hidden.
        u: distance relative to ``reference``.
        reference: distance of the block's centre, of each row.
        top: largest logit before the block.
        new: largest logit with it.
        part: Σ w.
        square: Σ w².
        energy: Σ w v.
        anchor: what ``travelled`` is relative to; ``reference`` from now on.
        travelled: mean distance under w: positions have more digits than their differences.
        spread: Σ w (distance − mean)².
    """
    fade = tl.exp2(top - new)
    block = tl.sum(w, 1)
    energy = fade * (energy + part * (top - new)) + tl.sum(w * v, 1)
    square = fade * fade * square + tl.sum(w * w, 1)
    # About the block's own mean, then two groups about theirs: raw moments of positions would cancel.
    inner = tl.sum(w * u, 1) / tl.maximum(block, TINY)
    aside = u - inner[:, None]
    within = tl.sum(w * aside * aside, 1)
    old = fade * part
    part = old + block
    whole = 1 / tl.maximum(part, TINY)
    share = block * whole
    travelled += anchor - reference
    ahead = inner - travelled
    spread = fade * spread + within + ahead * ahead * (old * share)
    travelled = inner * share + travelled * (old * whole)
    return part, square, energy, reference, travelled, spread


@triton.jit
def moments(x, shown, number, count, mean, scatter, MASKED: tl.constexpr):
    """Take a block's logits into their number, mean and Σ (x − mean)²: two groups about theirs."""
    if MASKED:
        centre = tl.sum(tl.where(shown, x, 0.0), 1) / tl.maximum(number, 1.0)
        aside = tl.where(shown, x - centre[:, None], 0.0)
    else:
        centre = tl.sum(x, 1) / number
        aside = x - centre[:, None]
    whole = count + number
    share = number / tl.maximum(whole, 1.0)
    between = centre - mean
    scatter += tl.sum(aside * aside, 1) + between * between * (count * share)
    return whole, mean + between * share, scatter


@triton.jit
def reach_kernel(
    mask, out, stride_b, stride_h, stride_i, stride_j, heads, n, m, masked_below,
    MASK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Where a block of vectors begins and ends to see others, of a mask: between are the only tiles to compute.

    Writes ``out``, (lines, blocks, 2), in multiples of ``BLOCK_J``; begin and end are 0 where it sees none.
    """
    block = tl.program_id(0)
    line = tl.program_id(1)
    mask += (line // heads).to(tl.int64) * stride_b + (line % heads).to(tl.int64) * stride_h
    i = block * BLOCK_I + tl.arange(0, BLOCK_I)
    low = tl.cdiv(m, BLOCK_J) * BLOCK_J
    high = 0
    for start in range(0, m, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        here = (i[:, None] < n) & (j[None, :] < m)
        at = i[:, None].to(tl.int64) * stride_i + j[None, :].to(tl.int64) * stride_j
        value = tl.load(mask + at, mask=here, other=0)
        shown = here & ((value != 0) if MASK == 1 else (value.to(tl.float32) > masked_below))
        any_shown = tl.max(tl.max(shown.to(tl.int32), 1), 0) > 0
        low = tl.where(any_shown, tl.minimum(low, start), low)
        high = tl.where(any_shown, start + BLOCK_J, high)
    out += (line * tl.num_programs(0) + block) * 2
    tl.store(out, tl.minimum(low, high))
    tl.store(out + 1, high)
