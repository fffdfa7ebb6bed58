"""The Triton kernel that has a block of query rows each and streams the keys: every statistic of a row."""

import triton
import triton.language as tl

from lightning_qk.functional._triton_tiles import (
    FAR,
    LN2,
    LOG2E,
    TINY,
    load,
    logits_of,
    merge,
    moments,
    product_of,
)


@triton.jit
def sums_kernel(
    key, out, stride_b, stride_h, stride_m, stride_d, kv_heads, m,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of the keys of each block, put one place later, so that running sums are of what comes before."""
    block = tl.program_id(0)
    line = tl.program_id(1)
    key += (line // kv_heads).to(tl.int64) * stride_b + (line % kv_heads).to(tl.int64) * stride_h
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k = load(key, j[:, None].to(tl.int64), d[None, :], stride_m, stride_d, m, D, BLOCK_D, True).to(tl.float32)
    out += (line.to(tl.int64) * (tl.num_programs(0) + 1) + block + 1) * BLOCK_D
    tl.store(out + d, tl.sum(k, 0))


@triton.jit(do_not_specialize=["rows", "m", "offset", "window"])
def rows_kernel(
    query, key, prefix, index, used, bias, mask, reach, sinks, values, state,
    query_b, query_h, query_n, query_d, key_b, key_h, key_m, key_d,
    bias_b, bias_h, bias_n, bias_m, mask_b, mask_h, mask_n, mask_m,
    reach_b, reach_h, heads, group, rows, m, offset, window, scale, cap, masked_below,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    SINKS: tl.constexpr, INDEX: tl.constexpr, OWN_MASK: tl.constexpr, LINEAR: tl.constexpr,
    PREFIX: tl.constexpr, JOINT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All statistics of a block of rows.

    One sweep over the visible blocks of keys, but for the linear share, which is relative to the mean logit of a
    row. Where it is asked for (``LINEAR``) the mean comes first. With plain dot products (``PREFIX``: no mask,
    window, bias or soft cap) the mean over whole blocks of keys is one product with the sum of those keys, and
    only the diagonal blocks are visited for the rest; otherwise a light sweep (product and sum) goes over all
    visible blocks before.

    ``reach``: which keys a block of rows sees by the mask, from ``reach_kernel``. ``OWN_MASK``: the mask has the
    rows of the index, and no others.

    Writes ``values``, (13, batch · heads, rows): the row statistics in the order of ``ROW_STATISTICS``, 0 where a
    row does not count, then whether the row counts, then whether its normalized entropy does. Writes ``state``,
    (4, batch · heads, rows): mean (0 unless ``LINEAR``) and log-partition relative to it (``JOINT``:
    not relative, one number less to load and digits that half precisions do not have), both over log 2, for
    ``keys_kernel``, and the largest and the lowest logit, −inf and inf where the row does not count.
    """
    # The last rows have the most to do in a causal call: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    line = tl.program_id(1)
    b = (line // heads).to(tl.int64)
    h = line % heads
    kv = (h // group).to(tl.int64)
    query += b * query_b + h.to(tl.int64) * query_h
    key += b * key_b + kv * key_h
    bias += b * bias_b + h.to(tl.int64) * bias_h
    mask += b * mask_b + h.to(tl.int64) * mask_h

    begin = block * BLOCK_M
    row = begin + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    i = row
    if INDEX:
        i = tl.load(index + b * rows + row, mask=row < rows, other=0).to(tl.int32)
    position = i + offset
    at = tl.where(row < rows, row, 0) if OWN_MASK else i
    present = tl.load(used + b * rows + row, mask=row < rows, other=0) != 0
    # Of an index, rows are anywhere: 0 for those past the end.
    end_i = rows
    if INDEX:
        end_i = 2147483647
    q = load(query, i[:, None].to(tl.int64), d[None, :], query_n, query_d, end_i, D, BLOCK_D, True)

    # Keys that some row sees, and where every row sees every key of a block that has neither a row's own key nor
    # its first: [low, high) but for [full_low, full_high) and [after_low, after_high).
    low = 0
    high = m
    last = tl.minimum(begin + BLOCK_M, rows) - 1 + offset
    if CAUSAL and not INDEX:
        high = tl.minimum(m, last + 1)
    if WINDOW and not INDEX:
        low = tl.maximum(begin + offset - window + 1, 0) // BLOCK_N * BLOCK_N
        if not CAUSAL:
            high = tl.minimum(m, last + window)
    if INDEX:
        # Of rows that are sampled in order.
        if CAUSAL:
            high = tl.minimum(m, tl.max(tl.where(present, position, -1), 0) + 1)
        if WINDOW:
            nearest = tl.min(tl.where(present, position, 2147483647), 0)
            low = tl.minimum(tl.maximum(nearest - window + 1, 0) // BLOCK_N * BLOCK_N, m)
    if (MASK != 0) and (not INDEX):
        reach += b * reach_b + h.to(tl.int64) * reach_h + block * 2
        low = tl.maximum(low, tl.load(reach))
        high = tl.minimum(high, tl.load(reach + 1))
    high = tl.where(tl.max(present.to(tl.int32), 0) > 0, high, low)
    full_low = high
    full_high = high
    after_low = high
    after_high = high
    SPLIT: tl.constexpr = (MASK == 0) and (not INDEX)
    BOTH_SIDES: tl.constexpr = SPLIT and (not (CAUSAL or WINDOW))
    BEGINS: tl.constexpr = (MASK != 0) or WINDOW  # elsewhere the first key is the first of all
    if SPLIT:
        whole = tl.maximum(high, 0) // BLOCK_N * BLOCK_N
        full_low = low + BLOCK_N
        if WINDOW:
            full_low = tl.maximum(full_low, (tl.maximum(last - window + 1, 0) // BLOCK_N + 1) * BLOCK_N)
        full_high = tl.maximum(begin + offset, 0) // BLOCK_N * BLOCK_N
        if WINDOW and not CAUSAL:
            full_high = tl.minimum(full_high, tl.maximum(begin + offset + window, 0) // BLOCK_N * BLOCK_N)
        full_high = tl.maximum(tl.minimum(full_high, whole), full_low)
        if BOTH_SIDES:
            after_low = tl.minimum((tl.maximum(last, 0) // BLOCK_N + 1) * BLOCK_N, whole)
            after_low = tl.maximum(after_low, full_high)
            after_high = tl.maximum(whole, after_low)

    # The mean logit of each row, where it has to be known before: 0 stands for it elsewhere.
    total = tl.zeros([BLOCK_M], tl.float32)
    count = tl.zeros([BLOCK_M], tl.float32)
    rest = low
    if PREFIX:
        blocks = tl.cdiv(m, BLOCK_N)
        before = blocks
        rest = high
        if CAUSAL:
            before = tl.maximum(tl.minimum(begin + offset + 1, m), 0) // BLOCK_N
            rest = before * BLOCK_N
        place = (b * (heads // group) + kv) * (blocks + 1) + before
        sums = tl.load(prefix + place * BLOCK_D + d)
        total = tl.sum(q.to(tl.float32) * sums[None, :], 1) * scale
    if LINEAR and ((not PREFIX) or CAUSAL):
        for start in range(rest, high, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            k = load(key, j[None, :].to(tl.int64), d[:, None], key_m, key_d, m, D, BLOCK_D, True)
            x, shown = logits_of(
                product_of(q, k, PRECISION), i[:, None], j[None, :], position[:, None], at[:, None], end_i, m,
                window, scale, cap, bias, bias_n, bias_m, mask, mask_n, mask_m, masked_below,
                CAUSAL, WINDOW, SOFTCAP, BIAS, MASK,
            )  # fmt: skip
            total += tl.sum(tl.where(shown, x, 0.0), 1)
            if not PREFIX:
                count += tl.sum(shown.to(tl.float32), 1)
    if PREFIX:
        count = tl.zeros([BLOCK_M], tl.float32) + m
        if CAUSAL:
            count = tl.maximum(tl.minimum(position + 1, m), 0).to(tl.float32)
    mean = total / tl.maximum(count, 1.0)

    # Softmax of each row and what is averaged under it.
    top = tl.full([BLOCK_M], FAR, tl.float32)
    own = tl.full([BLOCK_M], FAR, tl.float32)
    foremost = tl.full([BLOCK_M], FAR, tl.float32)
    found = tl.zeros([BLOCK_M], tl.int32)
    lowest = tl.full([BLOCK_M], float("inf"), tl.float32)
    centre = tl.zeros([BLOCK_M], tl.float32)
    part = tl.zeros([BLOCK_M], tl.float32)
    square = tl.zeros([BLOCK_M], tl.float32)
    energy = tl.zeros([BLOCK_M], tl.float32)
    anchor = tl.zeros([BLOCK_M], tl.float32)
    travelled = tl.zeros([BLOCK_M], tl.float32)
    spread = tl.zeros([BLOCK_M], tl.float32)
    scatter = tl.zeros([BLOCK_M], tl.float32)
    inside = tl.zeros([BLOCK_M], tl.float32)
    local = tl.arange(0, BLOCK_N).to(tl.float32) - (BLOCK_N - 1) * 0.5
    for stretch in tl.static_range(5):
        # Alternately with and without regard for visibility.
        if stretch == 0:
            start_at, stop_at = low, tl.minimum(full_low, high)
        elif stretch == 1:
            start_at, stop_at = full_low, full_high
        elif stretch == 2:
            start_at, stop_at = full_high, after_low
        elif stretch == 3:
            start_at, stop_at = after_low, after_high
        else:
            start_at, stop_at = after_high, high
        if (stretch == 0) or ((SPLIT and (stretch == 2)) or (BOTH_SIDES and (stretch == 4))):
            for start in range(start_at, stop_at, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                k = load(key, j[None, :].to(tl.int64), d[:, None], key_m, key_d, m, D, BLOCK_D, True)
                x, shown = logits_of(
                    product_of(q, k, PRECISION), i[:, None], j[None, :], position[:, None], at[:, None], end_i, m,
                    window, scale, cap, bias, bias_n, bias_m, mask, mask_n, mask_m, masked_below,
                    CAUSAL, WINDOW, SOFTCAP, BIAS, MASK,
                )  # fmt: skip
                if LINEAR:
                    z = tl.where(shown, x - mean[:, None], 0.0)
                    x = tl.where(shown, z, FAR)
                    scatter += tl.sum(z * z, 1)
                    inside += tl.sum(tl.where(x > -LOG2E, 1.0, 0.0), 1)
                else:
                    some = tl.sum(shown.to(tl.float32), 1)
                    count, centre, scatter = moments(x, shown, some, count, centre, scatter, True)
                    x = tl.where(shown, x, FAR)
                lowest = tl.minimum(lowest, tl.min(tl.where(shown, x, float("inf")), 1))
                own = tl.maximum(own, tl.max(tl.where(j[None, :] == position[:, None], x, FAR), 1))
                if BEGINS:
                    # The first block that shows a key has the first one.
                    first = tl.min(tl.where(shown, j[None, :], 2147483647), 1)
                    begun = tl.max(tl.where(j[None, :] == first[:, None], x, FAR), 1)
                    foremost = tl.where(found > 0, foremost, begun)
                    found = tl.where(first < 2147483647, 1, found)
                else:
                    foremost = tl.maximum(foremost, tl.max(tl.where(j[None, :] == 0, x, FAR), 1))
                new = tl.maximum(top, tl.max(x, 1))
                v = x - new[:, None]
                w = tl.where(shown, tl.exp2(v), 0.0)
                reference = tl.abs(position.to(tl.float32) - (start + (BLOCK_N - 1) * 0.5))
                u = tl.abs(position[:, None] - j[None, :]).to(tl.float32) - reference[:, None]
                part, square, energy, anchor, travelled, spread = merge(
                    v, w, u, reference, top, new, part, square, energy, anchor, travelled, spread
                )
                top = new
        elif (SPLIT and (stretch == 1)) or (BOTH_SIDES and (stretch == 3)):
            for start in range(start_at, stop_at, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                k = load(key, j[None, :].to(tl.int64), d[:, None], key_m, key_d, m, D, BLOCK_D, False)
                product = product_of(q, k, PRECISION)
                if SOFTCAP or BIAS:
                    x, shown = logits_of(
                        product, i[:, None], j[None, :], position[:, None], at[:, None], end_i, m,
                        window, scale, cap, bias, bias_n, bias_m, mask, mask_n, mask_m, masked_below,
                        False, False, SOFTCAP, BIAS, 0,
                    )  # fmt: skip
                    z = x - mean[:, None]
                else:
                    z = tl.fma(product, scale, -mean[:, None])
                new = tl.maximum(top, tl.max(z, 1))
                v = z - new[:, None]
                w = tl.exp2(v)
                lowest = tl.minimum(lowest, tl.min(z, 1))
                if LINEAR:
                    scatter += tl.sum(z * z, 1)
                    inside += tl.sum(tl.where(z > -LOG2E, 1.0, 0.0), 1)
                else:
                    count, centre, scatter = moments(z, True, BLOCK_N * 1.0, count, centre, scatter, False)
                reference = position.to(tl.float32) - (start + (BLOCK_N - 1) * 0.5)
                u = -local
                if stretch == 3:
                    reference = -reference
                    u = local
                part, square, energy, anchor, travelled, spread = merge(
                    v, w, u[None, :], reference, top, new, part, square, energy, anchor, travelled, spread
                )
                top = new

    # The other end of the linear window matters only to a row whose largest logit is beyond it.
    number = tl.maximum(count, 1.0)
    limit = (count - 1) * LOG2E
    beyond = (count > 1) & (top >= limit) & present
    above = tl.zeros([BLOCK_M], tl.float32)
    if LINEAR:  # noqa: SIM102 - known to the compiler
        if tl.max(beyond.to(tl.int32), 0) > 0:
            for start in range(low, high, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                k = load(key, j[None, :].to(tl.int64), d[:, None], key_m, key_d, m, D, BLOCK_D, True)
                x, shown = logits_of(
                    product_of(q, k, PRECISION), i[:, None], j[None, :], position[:, None], at[:, None], end_i, m,
                    window, scale, cap, bias, bias_n, bias_m, mask, mask_n, mask_m, masked_below,
                    CAUSAL, WINDOW, SOFTCAP, BIAS, MASK,
                )  # fmt: skip
                above += tl.sum((shown & (x - mean[:, None] >= limit[:, None])).to(tl.float32), 1)
    linear = tl.where(count > 1, (inside - above) / number, 0.0)

    # From here one number a row, natural logarithms.
    highest = (top + mean) * LN2
    energy = energy * LN2
    part = tl.maximum(part, 1.0)
    square = tl.maximum(square, TINY)
    learnt = tl.zeros([BLOCK_M], tl.float32)
    partition = part
    outcomes = count
    if SINKS:
        # Relative to the larger of the two, so that the sink's own weight does not overflow.
        sink = tl.load(sinks + h) - highest
        lower = tl.where(sink > 0, tl.exp(-tl.maximum(sink, 0.0)), 1.0)
        learnt = tl.where(sink > 0, 1.0, tl.exp(tl.minimum(sink, 0.0)))
        whole_part = part * lower + learnt
        entropy = (energy * lower + learnt * sink - tl.maximum(sink, 0.0) * whole_part) / whole_part
        entropy = tl.log(whole_part) - entropy
        square = (square * lower * lower + learnt * learnt) / (whole_part * whole_part)
        learnt = learnt / whole_part
        partition = whole_part / tl.maximum(lower, TINY)
        outcomes = count + 1
    else:
        entropy = tl.log(part) - energy / part
        square = square / (part * part)
    entropy = tl.maximum(entropy, 0.0)
    share = part / partition
    travelled += anchor
    distance = travelled * share
    rest_distance = travelled - distance
    spread = spread / partition + share * rest_distance * rest_distance + learnt * distance * distance

    counts = present & (count > 0)
    normalized = counts & (outcomes > 1)
    plane = tl.num_programs(1).to(tl.int64) * rows
    here = row < rows
    out = values + line.to(tl.int64) * rows + row
    tl.store(out, tl.where(counts, entropy, 0.0), mask=here)
    ratio = entropy / tl.log(tl.where(outcomes > 1, outcomes, 2.0))
    tl.store(out + plane, tl.where(normalized, ratio, 0.0), mask=here)
    tl.store(out + 2 * plane, tl.where(counts, 1 / tl.maximum(square, TINY), 0.0), mask=here)
    tl.store(out + 3 * plane, tl.where(counts, 1 / partition, 0.0), mask=here)
    tl.store(out + 4 * plane, tl.where(counts, tl.sqrt(scatter / number) * LN2, 0.0), mask=here)
    tl.store(out + 5 * plane, tl.where(counts, distance, 0.0), mask=here)
    tl.store(out + 6 * plane, tl.where(counts, tl.sqrt(spread), 0.0), mask=here)
    tl.store(out + 7 * plane, tl.where(counts, tl.exp2(own - top) / partition, 0.0), mask=here)
    tl.store(out + 8 * plane, tl.where(counts, tl.exp2(foremost - top) / partition, 0.0), mask=here)
    tl.store(out + 9 * plane, tl.where(counts, learnt, 0.0), mask=here)
    tl.store(out + 10 * plane, tl.where(counts, linear, 0.0), mask=here)
    tl.store(out + 11 * plane, counts.to(tl.float32), mask=here)
    tl.store(out + 12 * plane, normalized.to(tl.float32), mask=here)
    # Unused rows: what exp2 makes 0 whatever the logit.
    reference = top + tl.log2(partition)
    if JOINT:
        reference += mean
    out = state + line.to(tl.int64) * rows + row
    tl.store(out, mean, mask=here)
    tl.store(out + plane, tl.where(counts, reference, float("inf")), mask=here)
    tl.store(out + 2 * plane, tl.where(counts, highest, float("-inf")), mask=here)
    tl.store(out + 3 * plane, tl.where(counts, (lowest + mean) * LN2, float("inf")), mask=here)
