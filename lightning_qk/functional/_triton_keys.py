"""The Triton kernel that has a block of keys each and streams the rows: what keys receive.

It needs the finished softmax, and recomputes q·kᵀ rather than add atomically, so that results are the same in
every run.
"""

import triton
import triton.language as tl

from lightning_qk.functional._triton_tiles import load, logits_of, product_of


@triton.jit(do_not_specialize=["rows", "m", "offset", "window"])
def keys_kernel(
    query, key, index, bias, mask, reach, state, out,
    query_b, query_h, query_n, query_d, key_b, key_h, key_m, key_d,
    bias_b, bias_h, bias_n, bias_m, mask_b, mask_h, mask_n, mask_m,
    reach_b, reach_h, heads, group, rows, m, offset, window, scale, cap, masked_below,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    INDEX: tl.constexpr, OWN_MASK: tl.constexpr, EVERY: tl.constexpr, JOINT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a block of keys receives; tiles have keys along the first axis, so that each sum stays in a warp.

    Writes ``out``, (2 or 3, batch · heads, m): Σ p over the rows, how many rows see the key, and with an index
    Σ p². ``EVERY``: all rows count. ``reach``: which rows see a block of keys by the mask, from ``reach_kernel``.
    """
    block = tl.program_id(0)
    line = tl.program_id(1)
    b = (line // heads).to(tl.int64)
    h = line % heads
    query += b * query_b + h.to(tl.int64) * query_h
    key += b * key_b + (h // group).to(tl.int64) * key_h
    bias += b * bias_b + h.to(tl.int64) * bias_h
    mask += b * mask_b + h.to(tl.int64) * mask_h
    plane = tl.num_programs(1).to(tl.int64) * rows
    state += line.to(tl.int64) * rows

    begin = block * BLOCK_N
    j = begin + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k = load(key, j[:, None].to(tl.int64), d[None, :], key_m, key_d, m, D, BLOCK_D, True)
    low = 0
    high = rows
    if CAUSAL and not INDEX:
        low = tl.maximum(begin - offset, 0) // BLOCK_M * BLOCK_M
    if WINDOW and not INDEX:
        high = tl.minimum(rows, begin + BLOCK_N - 1 + window - offset)
        if not CAUSAL:
            low = tl.maximum(begin - window + 1 - offset, 0) // BLOCK_M * BLOCK_M
    if (MASK != 0) and (not INDEX):
        reach += b * reach_b + h.to(tl.int64) * reach_h + block * 2
        low = tl.maximum(low, tl.load(reach))
        high = tl.minimum(high, tl.load(reach + 1))
    full_low = high
    full_high = high
    SPLIT: tl.constexpr = ((MASK == 0) and EVERY) and ((not INDEX) and (CAUSAL or (not WINDOW)))
    if SPLIT:
        full_low = low
        full_high = rows // BLOCK_M * BLOCK_M
        if CAUSAL:
            full_low = tl.cdiv(tl.maximum(begin + BLOCK_N - 1 - offset, 0), BLOCK_M) * BLOCK_M
        if WINDOW:
            full_high = tl.minimum(full_high, tl.maximum(begin + window - offset, 0) // BLOCK_M * BLOCK_M)
        full_high = tl.maximum(full_high, full_low)

    received = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    seen = tl.zeros([BLOCK_N], tl.float32)
    for stretch in tl.static_range(3):
        if stretch == 0:
            start_at, stop_at = low, tl.minimum(full_low, high)
        elif stretch == 1:
            start_at, stop_at = full_low, full_high
        else:
            start_at, stop_at = full_high, high
        if (stretch == 0) or (SPLIT and (stretch == 2)):
            for start in range(start_at, stop_at, BLOCK_M):
                row = start + tl.arange(0, BLOCK_M)
                here = row < rows
                reference = tl.load(state + plane + row, mask=here, other=float("inf"))
                i = row
                end_i = rows
                if INDEX:
                    i = tl.load(index + b * rows + row, mask=here, other=0).to(tl.int32)
                    end_i = 2147483647
                at = tl.where(here, row, 0) if OWN_MASK else i
                q = load(
                    query, i[None, :].to(tl.int64), d[:, None], query_n, query_d, end_i, D, BLOCK_D, True
                )
                x, shown = logits_of(
                    product_of(k, q, PRECISION), i[None, :], j[:, None], (i + offset)[None, :], at[None, :],
                    end_i, m, window, scale, cap, bias, bias_n, bias_m, mask, mask_n, mask_m, masked_below,
                    CAUSAL, WINDOW, SOFTCAP, BIAS, MASK,
                )  # fmt: skip
                shown = shown & (reference < float("inf"))[None, :]
                if not JOINT:
                    x -= tl.load(state + row, mask=here, other=0.0)[None, :]
                p = tl.where(shown, tl.exp2(x - reference[None, :]), 0.0)
                received += tl.sum(p, 1)
                seen += tl.sum(shown.to(tl.float32), 1)
                if INDEX:
                    squares += tl.sum(p * p, 1)
        elif SPLIT and (stretch == 1):
            for start in range(start_at, stop_at, BLOCK_M):
                row = start + tl.arange(0, BLOCK_M)
                reference = tl.load(state + plane + row)
                q = load(
                    query, row[None, :].to(tl.int64), d[:, None], query_n, query_d, rows, D, BLOCK_D, False
                )
                product = product_of(k, q, PRECISION)
                if SOFTCAP or BIAS:
                    x, shown = logits_of(
                        product, row[None, :], j[:, None], (row + offset)[None, :], row[None, :],
                        rows, m, window, scale, cap, bias, bias_n, bias_m, mask, mask_n, mask_m, masked_below,
                        False, False, SOFTCAP, BIAS, 0,
                    )  # fmt: skip
                    if not JOINT:
                        x -= tl.load(state + row)[None, :]
                    x -= reference[None, :]
                else:
                    if JOINT:
                        x = tl.fma(product, scale, -reference[None, :])
                    else:
                        # As the first kernel computed it, to the last bit.
                        x = tl.fma(product, scale, -tl.load(state + row)[None, :]) - reference[None, :]
                received += tl.sum(tl.exp2(x), 1)
                seen += BLOCK_M
    plane = tl.num_programs(1).to(tl.int64) * m
    out += line.to(tl.int64) * m + j
    tl.store(out, received, mask=j < m)
    tl.store(out + plane, seen, mask=j < m)
    if INDEX:
        tl.store(out + 2 * plane, squares, mask=j < m)
