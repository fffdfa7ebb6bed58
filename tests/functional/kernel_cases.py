"""The kernels in Triton's interpreter against dense softmax in float64; run by test_kernel.py in a process of its
own, with TRITON_INTERPRET=1, since triton decides when it is imported."""

from typing import Any

import pytest
import torch
from oracles import dense_attention

from lightning_qk.functional import _kernel, _triton_keys, _triton_rows, attention_statistics
from lightning_qk.functional import attention as localization
from lightning_qk.functional._kernel import Blocks

BATCH, HEADS, N, D = 2, 2, 29, 8
SQUARE = (Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1))
OBLONG = (Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1))
FLAT = (Blocks(16, 32, 4, 1), Blocks(32, 16, 4, 1))


def more(*values: Any):
    """One more combination of what the other cases have each on its own: the interpreter needs a second for it."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def shapes(request, monkeypatch):
    """Every call runs the kernel, in small blocks, so that a short sequence has whole blocks and parts of them."""
    chosen = getattr(request, "param", SQUARE)

    def kernel_rows(source, used, index, wanted):
        assert _kernel.fits(source, index)
        every = source.every_row_counts
        return _kernel.launch(source, used, index, every=every, wanted=wanted, shapes=chosen)

    monkeypatch.setattr(localization, "kernel_rows", kernel_rows)


def tensors(kv_heads: int = 1, n: int = N, m: int = N, d: int = D, dtype=torch.float32, batch: int = BATCH):
    query = 2 * torch.randn(batch, HEADS, n, d)
    key = torch.randn(batch, kv_heads, m, d)
    key[:, 0, 2] = 3 * query[:, 0].mean(1)  # a sink
    # As models have them: the heads' dimension lies inside the positions'.
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    return query.to(dtype), key.to(dtype)


def check(got: dict, want: dict, **tolerance) -> None:
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-5}
    assert set(got) == set(want)
    for name, value in got.items():
        torch.testing.assert_close(
            value.double(),
            want[name].double(),
            msg=lambda m, n=name: f"{n}: {m}",
            equal_nan=True,
            **tolerance,
        )


def positions(n: int = N, m: int = N):
    return torch.arange(n)[:, None], torch.arange(m)[None]


def causal(n: int = N, m: int = N, offset: int = 0):
    i, j = positions(n, m)
    return (j <= i + offset)[None, None]


@pytest.mark.parametrize("shapes", [more(SQUARE), OBLONG, FLAT], indirect=True)
@pytest.mark.parametrize("is_causal", [True, False])
def test_whole_blocks_and_parts(is_causal):
    query, key = tensors(n=55, m=55)
    query, key = query[:1], key[:1]
    got = attention_statistics(query, key, is_causal=is_causal)
    check(got, dense_attention(query, key, causal(55, 55) if is_causal else None))


@pytest.mark.parametrize("n", [3, more(16), 17])
@pytest.mark.parametrize("is_causal", [True, False])
def test_lengths_at_the_edges_of_blocks(n, is_causal):
    query, key = tensors(n=n, m=n)
    visible = causal(n, n) if is_causal else None
    check(attention_statistics(query, key, is_causal=is_causal), dense_attention(query, key, visible))


@pytest.mark.parametrize("d", [5, more(16), 24])
def test_sizes_of_heads_and_groups(d):
    query, key = tensors(kv_heads=2, d=d)
    check(attention_statistics(query, key, is_causal=True), dense_attention(query, key, causal()))


@pytest.mark.parametrize(
    ("shapes", "window"),
    [(SQUARE, 4), (FLAT, 20), more(SQUARE, 20), more(FLAT, 4)],
    indirect=["shapes"],
)
def test_sliding_windows(window):
    query, key = tensors(n=53, m=53)
    query, key = query[:1], key[:1]
    i, j = positions(53, 53)
    near = ((i - j).abs() < window)[None, None]
    got = attention_statistics(query, key, is_causal=True, sliding_window=window)
    check(got, dense_attention(query, key, near & causal(53, 53)))
    check(attention_statistics(query, key, sliding_window=window), dense_attention(query, key, near))


@pytest.mark.parametrize(
    ("form", "side"),
    [
        ("bool", "left"),
        ("bool", "right"),
        ("additive", "left"),
        ("additive min", "right"),
        ("half", "left"),
        more("additive", "right"),
        more("additive min", "left"),
        more("half", "right"),
    ],
)
def test_padding(form, side):
    query, key = tensors()
    keep = torch.ones(BATCH, N, dtype=torch.bool)
    keep[1, slice(0, 17) if side == "left" else slice(-17, None)] = False
    visible = keep[:, None, None, :] & causal()
    low = {"additive": -1e4, "additive min": torch.finfo(torch.float32).min, "half": -torch.inf}
    mask = visible if form == "bool" else torch.zeros(visible.shape).masked_fill(~visible, low[form])
    mask = mask.half() if form == "half" else mask
    want = dense_attention(query, key, visible, padding=keep)
    query, key = query.clone(), key.clone()
    query[1, :, ~keep[1]] = torch.nan
    key[1, :, ~keep[1]] = torch.inf
    check(attention_statistics(query, key, mask=mask), want)


def test_masks_that_broadcast_or_not():
    query, key = tensors(n=21, m=21)
    for shape in [(BATCH, HEADS, 21, 21), (HEADS, 21, 21), (BATCH, 1, 1, 21)]:
        visible = torch.rand(shape) < 0.5
        want = dense_attention(query, key, visible.view((1,) * (4 - len(shape)) + shape))
        check(attention_statistics(query, key, mask=visible, self_attention=False), want)
    nothing = attention_statistics(query, key, mask=torch.zeros(1, 1, 21, 21, dtype=torch.bool))
    assert all(value.isnan().all() for value in nothing.values())


def test_mask_and_causality_together():
    query, key = tensors()
    visible = torch.rand(BATCH, 1, N, N) < 0.7
    got = attention_statistics(query, key, mask=visible, is_causal=True, self_attention=False)
    check(got, dense_attention(query, key, visible & causal()))


@pytest.mark.parametrize("is_causal", [True, False])
def test_rows_that_do_not_count(is_causal):
    query, key = tensors()
    keep = torch.rand(BATCH, N) < 0.5
    query[~keep[:, None].expand(-1, HEADS, -1)] *= 100  # they would have the extremes
    got = attention_statistics(query, key, query_mask=keep, is_causal=is_causal)
    check(got, dense_attention(query, key, causal() if is_causal else None, padding=keep))


@pytest.mark.parametrize("is_causal", [True, False])
def test_cross_attention(is_causal):
    for n, m in [(29, 18), (18, 40)]:
        query, key = tensors(n=n, m=m)
        visible = causal(n, m) if is_causal else None
        check(attention_statistics(query, key, is_causal=is_causal), dense_attention(query, key, visible))


@pytest.mark.parametrize("offset", [more(16), 23, -5, more(40)])
def test_position_of_the_first_query(offset):
    n, m = 18, 44
    query, key = tensors(n=n, m=m, batch=1)
    got = attention_statistics(query, key, is_causal=True, query_offset=offset)
    check(got, dense_attention(query, key, causal(n, m, offset), offset=offset))


@pytest.mark.parametrize("is_causal", [True, False])
def test_learnt_sinks(is_causal):
    query, key = tensors(batch=1)
    for sinks in (torch.tensor([-1.0, 2.0]), torch.tensor([30.0, 500.0])):
        got = attention_statistics(query, key, is_causal=is_causal, sinks=sinks)
        check(got, dense_attention(query, key, causal() if is_causal else None, sinks=sinks))


@pytest.mark.parametrize("is_causal", [True, False])
def test_bias_softcap_and_scaling(is_causal):
    query, key = tensors()
    bias = torch.randn(1, HEADS, N, N)
    visible = causal() if is_causal else None
    for arguments in ({"bias": bias, "softcap": 1.5, "scaling": 0.7}, {"scaling": -0.3}, {"softcap": 30.0}):
        got = attention_statistics(query, key, is_causal=is_causal, **arguments)
        check(got, dense_attention(query, key, visible, **arguments))
    if is_causal:
        mask = bias.masked_fill(~causal(), -torch.inf)
        check(attention_statistics(query, key, mask=mask), dense_attention(query, key, visible, bias=bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, more(torch.float16)])
def test_half_precisions(dtype):
    query, key = tensors(d=16, dtype=dtype, batch=1)
    check(attention_statistics(query, key, is_causal=True), dense_attention(query, key, causal()))
    # Mixed: the key of a cache in another precision.
    got = attention_statistics(query, key.float(), is_causal=True)
    check(got, dense_attention(query, key, causal()))


@pytest.mark.parametrize("is_causal", [True, False])
def test_large_logits(is_causal):
    query, key = tensors(batch=1)
    query, key = 1e3 * query, 1e3 * key
    want = dense_attention(query, key, causal() if is_causal else None)
    check(attention_statistics(query, key, is_causal=is_causal), want, rtol=1e-4, atol=1e-4)


def test_spread_of_distances_far_away():
    """Distances near 100 000 with a spread of a few positions: squares would need 34 bits."""
    query, key = tensors(m=40)
    got = attention_statistics(query, key, query_offset=100_000)
    want = dense_attention(query, key, offset=100_000)
    torch.testing.assert_close(got["distance_spread"].double(), want["distance_spread"], rtol=1e-5, atol=0)
    check(got, want)


def test_one_visible_key():
    query, key = tensors()
    alone = attention_statistics(query, key, mask=torch.eye(N, dtype=torch.bool))
    assert alone["entropy"].abs().max() == 0
    assert alone["diagonal"].min() == 1
    assert alone["linear_share"].max() == 0
    assert alone["entropy_normalized"].isnan().all()


@pytest.mark.parametrize(
    "arguments", [{"is_causal": True}, {}, {"is_causal": True, "sliding_window": 9}, "mask"]
)
def test_sampled_rows_as_by_chunks(arguments, monkeypatch):
    """The same rows, by both ways: means, standard errors and sink rates."""
    query, key = tensors(n=40, m=40, batch=1 if arguments != "mask" else BATCH)
    if arguments == "mask":
        keep = torch.ones(BATCH, 1, 1, 40, dtype=torch.bool)
        keep[1, ..., :14] = False
        arguments = {"mask": keep & causal(40, 40), "sinks": torch.tensor([0.3, -1.0])}
    got, want = None, None
    for rows in (7, 20):
        draw = {"rows": rows, **arguments}
        got = attention_statistics(query, key, generator=torch.Generator().manual_seed(1), **draw)
        with monkeypatch.context() as patch:
            patch.setattr(localization, "kernel_rows", lambda *_, **__: None)
            want = attention_statistics(query, key, generator=torch.Generator().manual_seed(1), **draw)
        check(got, want)


WINDOWED = {"is_causal": True, "sliding_window": 9}


@pytest.mark.parametrize("how", ["causal", "bidirectional", "window", "mask", more("bias")])
@pytest.mark.parametrize("left_out", [("linear_share", "sink_rate"), more("linear_share")])
def test_one_sweep_gives_the_rest(how, left_out):
    """What needs a second sweep is left out; what is left is the same."""
    query, key = tensors(n=40, m=40)
    i, j = positions(40, 40)
    documents = (i // 13 == j // 13)[None, None]
    bias = torch.randn(1, HEADS, 40, 40)
    visible = {
        "bidirectional": None,
        "window": causal(40, 40) & (i - j < 9),
        "mask": documents & causal(40, 40),
    }
    arguments = {
        "causal": {"is_causal": True},
        "bidirectional": {},
        "window": WINDOWED,
        "mask": {"mask": documents, "is_causal": True},
        "bias": {"is_causal": True, "bias": bias, "softcap": 2.0},
    }[how]
    extra = {"bias": bias, "softcap": 2.0} if how == "bias" else {}
    want = dense_attention(query, key, visible.get(how, causal(40, 40)), **extra)
    only = [name for name in want if name not in left_out]
    got = attention_statistics(query, key, only=only, **arguments)
    check(got, {name: want[name] for name in only})
    assert not {"linear_share"} & set(got)


@pytest.fixture
def tiles(monkeypatch):
    """Counts the tiles of q·kᵀ that are computed, by kernel."""
    counts = {"rows": 0, "keys": 0}
    for name, module in (("rows", _triton_rows), ("keys", _triton_keys)):

        def counted(*arguments, own=module.product_of, name=name):
            counts[name] += 1
            return own(*arguments)

        monkeypatch.setattr(module, "product_of", counted)
    return counts


N_BLOCKS = 6
CAUSAL_TILES = N_BLOCKS * (N_BLOCKS + 1) // 2
ONE_SWEEP = ("entropy", "max_logit", "max_abs_logit", "distance", "sink_first", "logit_std", "participation")
SAMPLED = torch.Generator()


def documents(batch, head, query, key):
    return (query // 32 == key // 32) & (key <= query)


@pytest.mark.parametrize(
    ("arguments", "only", "rows", "keys"),
    [
        # One sweep over the visible blocks, and none of the other kernel.
        ({"is_causal": True}, ONE_SWEEP, CAUSAL_TILES, 0),
        ({}, ONE_SWEEP, N_BLOCKS**2, 0),
        # The linear share: the diagonal once more, where the mean follows from sums of keys.
        ({"is_causal": True}, (*ONE_SWEEP, "linear_share"), CAUSAL_TILES + N_BLOCKS, 0),
        ({"is_causal": True}, (*ONE_SWEEP, "sink_rate"), CAUSAL_TILES, CAUSAL_TILES),
        # A window of 16 touches two blocks of 16, of the first row of blocks one.
        (WINDOWED, ONE_SWEEP, 2 * N_BLOCKS - 1, 0),
        (WINDOWED, None, 2 * (2 * N_BLOCKS - 1), 2 * N_BLOCKS - 1),
        # Three packed documents of two blocks each, as a mask.
        ("documents", ONE_SWEEP, 9, 0),
        ("documents", None, 2 * 9, 9),
        # A window as a mask.
        ("window", ONE_SWEEP, 2 * N_BLOCKS - 1, 0),
        # Half of a sequence is padding: its rows have no tiles, and no row has tiles of its keys.
        ("padding", ONE_SWEEP, 6, 0),
    ],
)
def test_only_visible_tiles_are_computed(tiles, arguments, only, rows, keys):
    n = 16 * N_BLOCKS
    # Small logits: a row with one that is far above its mean is visited once more.
    query, key = (0.3 * torch.randn(2, 1, 1, n, 8)).unbind()
    i, j = positions(n, n)
    masks = {
        "documents": documents(None, None, i, j),
        "window": (i - j < 9) & (j <= i),
        "padding": (j <= i) & (j < n // 2),
    }
    extra = {}
    if isinstance(arguments, str):
        visible = masks[arguments][None, None]
        if arguments == "padding":
            extra = {"padding": (torch.arange(n) < n // 2)[None]}
            arguments = {"mask": visible, "query_mask": extra["padding"]}
        else:
            arguments = {"mask": visible}
    else:
        visible = causal(n, n) if "is_causal" in arguments else None
        if "sliding_window" in arguments:
            visible = masks["window"][None, None]
    got = attention_statistics(query, key, only=only, **arguments)
    assert tiles == {"rows": rows, "keys": keys}
    want = dense_attention(query, key, visible, **extra)
    check(got, {name: value for name, value in want.items() if only is None or name in only})


@pytest.mark.parametrize(
    ("arguments", "most"), [({}, 4), ({"is_causal": True}, 3), ({"is_causal": True, "sliding_window": 9}, 2)]
)
def test_sampled_rows_are_computed_alone(tiles, arguments, most):
    """One block of 16 rows, of the keys that the furthest of them sees; as many as there are rows at most."""
    n = 64
    query, key = torch.randn(2, 1, 1, n, 8).unbind()
    keep = (torch.arange(n) >= 28) & (torch.arange(n) < 44)
    attention_statistics(
        query,
        key,
        rows=16,
        query_mask=keep[None],
        only=ONE_SWEEP,
        generator=SAMPLED.manual_seed(0),
        **arguments,
    )
    assert tiles == {"rows": most, "keys": 0}


def test_a_mask_function_on_sampled_rows(tiles, monkeypatch):
    """It is evaluated for these rows, and the kernel has its values; of all rows it goes by chunks."""
    query, key = tensors(n=96, m=96)
    draw = {"mask": documents, "rows": 20}
    got = attention_statistics(query, key, generator=SAMPLED.manual_seed(1), **draw)
    assert tiles["rows"] > 0
    monkeypatch.setattr(localization, "kernel_rows", lambda *_, **__: None)
    check(got, attention_statistics(query, key, generator=SAMPLED.manual_seed(1), **draw))


def test_per_sequence():
    query, key = tensors()
    got = attention_statistics(query, key, is_causal=True, per_sequence=True)
    for b in range(BATCH):
        want = dense_attention(query[b : b + 1], key[b : b + 1], causal())
        check({name: value[b] for name, value in got.items()}, want)
