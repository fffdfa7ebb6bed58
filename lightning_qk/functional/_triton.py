"""Triton kernels for the row statistics of attention: logits live in registers alone, one block at a time.

Imported only when a kernel is launched, since the package needs triton nowhere else.

Two kernels visit q·kᵀ. The first has a block of query rows each, streams the keys, and ends with every statistic
of its rows (online softmax). Its second sweep is needed only where the mean logit of a row is not known before,
see ``rows_kernel``. The other kernel has a block of keys each, streams the rows, and sums the probabilities that
each key receives: it needs the finished softmax, and recomputes q·kᵀ rather than add atomically, so that results
are the same in every run.

Logits are kept in units of log 2 and relative to their row's mean, one multiply-add from the product: their square
gives the variance, their comparison with one threshold the linear share, and ``exp2`` takes them as they are.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# Below any logit relative to its mean whose statistics are kept (_LARGEST in _kernel.py), and finite, so that
# its product with 0 is 0.
_FAR = tl.constexpr(-1e30)
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _load(
    pointer, i, d, stride_i, stride_d, end, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr
):
    """Vectors number ``i`` (0 from ``end`` on) of a matrix; ``i`` and ``d`` broadcast to the tile's shape."""
    place = pointer + i * stride_i + d * stride_d
    if CHECK or (BLOCK_D != D):
        return tl.load(place, mask=(i < end) & (d < D), other=0.0)
    else:
        return tl.load(place)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """Product of two tiles; half precisions are multiplied exactly and summed in float32."""
    if PRECISION == "ieee":
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _logits(
    product, i, j, position, end_i, end_j, window, scale, cap,
    bias, bias_i, bias_j, mask, mask_i, mask_j, masked_below,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Logits over log 2 and visibility of a tile; ``i``, ``j`` and ``position`` broadcast, in either order."""
    shown = (i < end_i) & (j < end_j)
    x = product * scale
    if SOFTCAP:
        decay = tl.exp2(tl.abs(x) * (-2 * _LOG2E))
        x = tl.where(x < 0, -cap, cap) * ((1 - decay) / (1 + decay))
    if BIAS:
        at = i.to(tl.int64) * bias_i + j.to(tl.int64) * bias_j
        x += tl.load(bias + at, mask=shown, other=0.0).to(tl.float32) * _LOG2E
    if MASK != 0:
        at = i.to(tl.int64) * mask_i + j.to(tl.int64) * mask_j
        value = tl.load(mask + at, mask=shown, other=0)
        if MASK == 1:
            shown = shown & (value != 0)
        else:
            value = value.to(tl.float32)
            shown = shown & (value > masked_below)
            x += tl.where(shown, value, 0.0) * _LOG2E
    if CAUSAL:
        shown = shown & (j <= position)
    if WINDOW:
        shown = shown & (tl.abs(j - position) < window)
    return x, shown


@triton.jit
def _merge(v, w, u, reference, top, new, part, square, energy, anchor, travelled, spread):
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
    inner = tl.sum(w * u, 1) / tl.maximum(block, _TINY)
    aside = u - inner[:, None]
    within = tl.sum(w * aside * aside, 1)
    old = fade * part
    part = old + block
    whole = 1 / tl.maximum(part, _TINY)
    share = block * whole
    travelled += anchor - reference
    ahead = inner - travelled
    spread = fade * spread + within + ahead * ahead * (old * share)
    travelled = inner * share + travelled * (old * whole)
    return part, square, energy, reference, travelled, spread


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
    k = _load(key, j[:, None].to(tl.int64), d[None, :], stride_m, stride_d, m, D, BLOCK_D, True).to(
        tl.float32
    )
    out += (line.to(tl.int64) * (tl.num_programs(0) + 1) + block + 1) * BLOCK_D
    tl.store(out + d, tl.sum(k, 0))


@triton.jit(do_not_specialize=["rows", "m", "offset", "window"])
def rows_kernel(
    query, key, prefix, index, used, bias, mask, sinks, values, state,
    query_b, query_h, query_n, query_d, key_b, key_h, key_m, key_d,
    bias_b, bias_h, bias_n, bias_m, mask_b, mask_h, mask_n, mask_m,
    heads, group, rows, m, offset, window, scale, cap, masked_below,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    SINKS: tl.constexpr, INDEX: tl.constexpr, PREFIX: tl.constexpr, JOINT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All statistics of a block of rows.

    The mean logit of a row comes first, since the linear share and the variance are relative to it. With plain
    dot products (``PREFIX``: no mask, window, bias or soft cap) the mean over whole blocks of keys is one product
    with the sum of those keys, and only the diagonal blocks are visited for the rest; otherwise a light sweep
    (product and sum) goes over all visible blocks before.

    Writes ``values``, (13, batch · heads, rows): the row statistics in the order of ``ROW_STATISTICS``, 0 where a
    row does not count, then whether the row counts, then whether its normalized entropy does. Writes ``state``,
    (3, batch · heads, rows): mean and log-partition relative to it (``JOINT``: not relative, one
    number less to load and digits that half precisions do not have), both over log 2, for ``keys_kernel``, and the
    largest logit, −inf where the row does not count.
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
    present = tl.load(used + b * rows + row, mask=row < rows, other=0) != 0
    # Of an index, rows are anywhere: 0 for those past the end.
    end_i = rows
    if INDEX:
        end_i = 2147483647
    q = _load(query, i[:, None].to(tl.int64), d[None, :], query_n, query_d, end_i, D, BLOCK_D, True)

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
    full_low = high
    full_high = high
    after_low = high
    after_high = high
    SPLIT: tl.constexpr = (MASK == 0) and (not INDEX)
    BOTH_SIDES: tl.constexpr = SPLIT and (not (CAUSAL or WINDOW))
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

    # The mean logit of each row.
    total = tl.zeros([BLOCK_M], tl.float32)
    count = tl.zeros([BLOCK_M], tl.float32)
    first = tl.full([BLOCK_M], 2147483647, tl.int32)
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
    if (not PREFIX) or CAUSAL:
        for start in range(rest, high, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            k = _load(key, j[None, :].to(tl.int64), d[:, None], key_m, key_d, m, D, BLOCK_D, True)
            x, shown = _logits(
                _product(q, k, PRECISION), i[:, None], j[None, :], position[:, None], end_i, m,
                window, scale, cap, bias, bias_n, bias_m, mask, mask_n, mask_m, masked_below,
                CAUSAL, WINDOW, SOFTCAP, BIAS, MASK,
            )  # fmt: skip
            total += tl.sum(tl.where(shown, x, 0.0), 1)
            if not PREFIX:
                count += tl.sum(shown.to(tl.float32), 1)
                first = tl.minimum(first, tl.min(tl.where(shown, j[None, :], 2147483647), 1))
    if PREFIX:
        first = tl.zeros([BLOCK_M], tl.int32)
        count = tl.zeros([BLOCK_M], tl.float32) + m
        if CAUSAL:
            count = tl.maximum(tl.minimum(position + 1, m), 0).to(tl.float32)
    number = tl.maximum(count, 1.0)
    mean = total / number

    # Softmax of each row and what is averaged under it.
    top = tl.full([BLOCK_M], _FAR, tl.float32)
    own = tl.full([BLOCK_M], _FAR, tl.float32)
    foremost = tl.full([BLOCK_M], _FAR, tl.float32)
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
                k = _load(key, j[None, :].to(tl.int64), d[:, None], key_m, key_d, m, D, BLOCK_D, True)
                x, shown = _logits(
                    _product(q, k, PRECISION), i[:, None], j[None, :], position[:, None], end_i, m,
                    window, scale, cap, bias, bias_n, bias_m, mask, mask_n, mask_m, masked_below,
                    CAUSAL, WINDOW, SOFTCAP, BIAS, MASK,
                )  # fmt: skip
                x = tl.where(shown, x - mean[:, None], _FAR)
                own = tl.maximum(own, tl.max(tl.where(j[None, :] == position[:, None], x, _FAR), 1))
                foremost = tl.maximum(foremost, tl.max(tl.where(j[None, :] == first[:, None], x, _FAR), 1))
                new = tl.maximum(top, tl.max(x, 1))
                v = x - new[:, None]
                w = tl.where(shown, tl.exp2(v), 0.0)
                z = tl.where(shown, x, 0.0)
                scatter += tl.sum(z * z, 1)
                inside += tl.sum(tl.where(x > -_LOG2E, 1.0, 0.0), 1)
                reference = tl.abs(position.to(tl.float32) - (start + (BLOCK_N - 1) * 0.5))
                u = tl.abs(position[:, None] - j[None, :]).to(tl.float32) - reference[:, None]
                part, square, energy, anchor, travelled, spread = _merge(
                    v, w, u, reference, top, new, part, square, energy, anchor, travelled, spread
                )
                top = new
        elif (SPLIT and (stretch == 1)) or (BOTH_SIDES and (stretch == 3)):
            for start in range(start_at, stop_at, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                k = _load(key, j[None, :].to(tl.int64), d[:, None], key_m, key_d, m, D, BLOCK_D, False)
                product = _product(q, k, PRECISION)
                if SOFTCAP or BIAS:
                    x, shown = _logits(
                        product, i[:, None], j[None, :], position[:, None], end_i, m,
                        window, scale, cap, bias, bias_n, bias_m, mask, mask_n, mask_m, masked_below,
                        False, False, SOFTCAP, BIAS, 0,
                    )  # fmt: skip
                    z = x - mean[:, None]
                else:
                    z = tl.fma(product, scale, -mean[:, None])
                new = tl.maximum(top, tl.max(z, 1))
                v = z - new[:, None]
                w = tl.exp2(v)
                scatter += tl.sum(z * z, 1)
                inside += tl.sum(tl.where(z > -_LOG2E, 1.0, 0.0), 1)
                reference = position.to(tl.float32) - (start + (BLOCK_N - 1) * 0.5)
                u = -local
                if stretch == 3:
                    reference = -reference
                    u = local
                part, square, energy, anchor, travelled, spread = _merge(
                    v, w, u[None, :], reference, top, new, part, square, energy, anchor, travelled, spread
                )
                top = new

    # The other end of the linear window matters only to a row whose largest logit is beyond it.
    limit = (count - 1) * _LOG2E
    beyond = (count > 1) & (top >= limit) & present
    above = tl.zeros([BLOCK_M], tl.float32)
    if tl.max(beyond.to(tl.int32), 0) > 0:
        for start in range(low, high, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            k = _load(key, j[None, :].to(tl.int64), d[:, None], key_m, key_d, m, D, BLOCK_D, True)
            x, shown = _logits(
                _product(q, k, PRECISION), i[:, None], j[None, :], position[:, None], end_i, m,
                window, scale, cap, bias, bias_n, bias_m, mask, mask_n, mask_m, masked_below,
                CAUSAL, WINDOW, SOFTCAP, BIAS, MASK,
            )  # fmt: skip
            above += tl.sum((shown & (x - mean[:, None] >= limit[:, None])).to(tl.float32), 1)
    linear = tl.where(count > 1, (inside - above) / number, 0.0)

    # From here one number a row, natural logarithms.
    highest = (top + mean) * _LN2
    energy = energy * _LN2
    part = tl.maximum(part, 1.0)
    square = tl.maximum(square, _TINY)
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
        partition = whole_part / tl.maximum(lower, _TINY)
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
    tl.store(out + 2 * plane, tl.where(counts, 1 / tl.maximum(square, _TINY), 0.0), mask=here)
    tl.store(out + 3 * plane, tl.where(counts, 1 / partition, 0.0), mask=here)
    tl.store(out + 4 * plane, tl.where(counts, tl.sqrt(scatter / number) * _LN2, 0.0), mask=here)
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


@triton.jit(do_not_specialize=["rows", "m", "offset", "window"])
def keys_kernel(
    query, key, index, bias, mask, state, out,
    query_b, query_h, query_n, query_d, key_b, key_h, key_m, key_d,
    bias_b, bias_h, bias_n, bias_m, mask_b, mask_h, mask_n, mask_m,
    heads, group, rows, m, offset, window, scale, cap, masked_below,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
    INDEX: tl.constexpr, EVERY: tl.constexpr, JOINT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a block of keys receives; tiles have keys along the first axis, so that each sum stays in a warp.

    Writes ``out``, (3 or 4, batch · heads, m): Σ p over the rows, how many rows see the key, the lowest logit,
    and with an index Σ p². ``EVERY``: all rows count.
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
    k = _load(key, j[:, None].to(tl.int64), d[None, :], key_m, key_d, m, D, BLOCK_D, True)
    low = 0
    high = rows
    if CAUSAL and not INDEX:
        low = tl.maximum(begin - offset, 0) // BLOCK_M * BLOCK_M
    if WINDOW and not INDEX:
        high = tl.minimum(rows, begin + BLOCK_N - 1 + window - offset)
        if not CAUSAL:
            low = tl.maximum(begin - window + 1 - offset, 0) // BLOCK_M * BLOCK_M
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
        # Keys past the end would be among the lowest logits.
        full_high = tl.where(begin + BLOCK_N <= m, tl.maximum(full_high, full_low), full_low)

    received = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    seen = tl.zeros([BLOCK_N], tl.float32)
    lowest = tl.full([BLOCK_N], float("inf"), tl.float32)
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
                q = _load(
                    query, i[None, :].to(tl.int64), d[:, None], query_n, query_d, end_i, D, BLOCK_D, True
                )
                x, shown = _logits(
                    _product(k, q, PRECISION), i[None, :], j[:, None], (i + offset)[None, :],
                    end_i, m, window, scale, cap, bias, bias_n, bias_m, mask, mask_n, mask_m, masked_below,
                    CAUSAL, WINDOW, SOFTCAP, BIAS, MASK,
                )  # fmt: skip
                shown = shown & (reference < float("inf"))[None, :]
                lowest = tl.minimum(lowest, tl.min(tl.where(shown, x, float("inf")), 1))
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
                q = _load(
                    query, row[None, :].to(tl.int64), d[:, None], query_n, query_d, rows, D, BLOCK_D, False
                )
                product = _product(k, q, PRECISION)
                if SOFTCAP or BIAS:
                    x, shown = _logits(
                        product, row[None, :], j[:, None], (row + offset)[None, :],
                        rows, m, window, scale, cap, bias, bias_n, bias_m, mask, mask_n, mask_m, masked_below,
                        False, False, SOFTCAP, BIAS, 0,
                    )  # fmt: skip
                    lowest = tl.minimum(lowest, tl.min(x, 1))
                    if not JOINT:
                        x -= tl.load(state + row)[None, :]
                    x -= reference[None, :]
                else:
                    lowest = tl.minimum(lowest, tl.min(product, 1) * scale)
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
    tl.store(out + 2 * plane, lowest * _LN2, mask=j < m)
    if INDEX:
        tl.store(out + 3 * plane, squares, mask=j < m)
