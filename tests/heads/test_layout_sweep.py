"""Every order of rows under every name, against the q and k that the layer's own product takes."""

import itertools

import pytest
import torch
from sweep import (
    AXES,
    D_HEAD,
    HEADS,
    KINDS,
    NAMES,
    STORES,
    WAYS,
    WIDTH,
    Case,
    ContextAttention,
    SeparateSelfAttention,
    SweptAttention,
    ThreeInputAttention,
)
from torch import nn

from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.interventions.head_scaler import head_scalers
from lightning_qk.interventions.qk_clip import clip_qk

SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("a", "b", "c"),
    ("key", "query", "value"),
)
CUTS = ("heads first", "heads last")


def _model(make):
    torch.manual_seed(0)
    return nn.ModuleDict({"layer": make()}).double()


def _given(layer, *tokens):
    """Random inputs, and what the layer made of them."""
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(2, count, width, generator=generator, dtype=torch.float64) for count, width in tokens
    ]
    layer(*inputs)
    return inputs, {side: values.clone() for side, values in layer.seen.items()}


def _project(weight, bias, x):
    rows = torch.einsum("bnd,hed->bhne", x, weight)
    return rows if bias is None else rows + bias[:, None]


def _is_right(read, inputs, seen):
    key_input = inputs[1] if len(inputs) > 1 else inputs[0]
    for weight, bias, x, side in (
        (read.query, read.query_bias, inputs[0], "q"),
        (read.key, read.key_bias, key_input, "k"),
    ):
        got = _project(weight, bias, x)
        if got.shape != seen[side].shape or not torch.allclose(got, seen[side], atol=1e-9):
            return False
    return abs(read.scaling - D_HEAD**-0.5) < 1e-6


def _verdict(model, *tokens):
    """True for right, False for wrong, None for refused."""
    layer = model["layer"]
    reader = ProjectionReader(model, allow_empty=True)
    if "layer" not in reader:
        assert reader.unread["layer"]
        return None
    inputs, seen = _given(layer, *tokens)
    return _is_right(reader["layer"], inputs, seen)


def _verdicts(cases):
    return {case: _verdict(_model(lambda case=case: SweptAttention(case)), (5, WIDTH)) for case in cases}


def test_no_name_decides_for_a_class_of_ones_own():
    """The 108 of 6 orders, 9 names and 2 ways to attend: at least 100 right, none wrong."""
    verdicts = _verdicts(
        Case(axes, "qkv", name, way) for axes, name, way in itertools.product(AXES, NAMES, ("sdpa", "matmul"))
    )
    assert len(verdicts) == 108
    assert not [case for case, verdict in verdicts.items() if verdict is False]
    assert sum(verdict is True for verdict in verdicts.values()) >= 100


def test_queries_and_keys_are_told_apart():
    """The 36 orders of rows and of what the three are."""
    verdicts = _verdicts(Case(axes, kinds, "qkv") for axes, kinds in itertools.product(AXES, KINDS))
    assert [case for case, verdict in verdicts.items() if verdict is not True] == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("store", STORES)
def test_any_way_to_store_and_to_attend_is_read(store, way):
    verdicts = _verdicts(
        Case(axes, "kqv", "qkv", way, store, bias) for axes, bias in (("the", True), ("eht", False))
    )
    assert [case for case, verdict in verdicts.items() if verdict is not True] == []


@pytest.mark.parametrize("names", SEPARATE)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
def test_separate_projections_are_read_as_they_are_cut(names, cut, kv_heads):
    for way, bias in (("sdpa", True), ("baddbmm", False)):
        model = _model(lambda way=way, bias=bias: SeparateSelfAttention(names, cut, way, kv_heads, bias))
        assert _verdict(model, (5, WIDTH)) is True


@pytest.mark.parametrize("kdim", [WIDTH, 16])
@pytest.mark.parametrize("cut", CUTS)
def test_cross_attention_is_read(cut, kdim):
    for kind, count in ((ThreeInputAttention, 3), (ContextAttention, 2)):
        model = _model(lambda kind=kind: kind(SEPARATE[0], cut, "einsum", 2, True, kdim))
        assert _verdict(model, (5, WIDTH), *[(7, kdim)] * (count - 1)) is True
        (read,) = ProjectionReader(model).values()
        assert read.self_attention is (kdim == WIDTH)  # where only a call tells, until it does


EDITED = [
    *(Case(axes, kinds, "qkv", "matmul") for axes in AXES for kinds in ("qkv", "vkq")),
    *(Case("hte", "qkv", "c_attn", "sdpa", store, bias) for store in STORES for bias in (False, True)),
]


@pytest.mark.parametrize("case", EDITED, ids="-".join(map(str, range(len(EDITED)))).split("-"))
def test_scaling_multiplies_queries_and_keys_and_leaves_values(case):
    model = _model(lambda: SweptAttention(case))
    layer = model["layer"]
    reader = ProjectionReader(model)
    inputs, before = _given(layer, (5, WIDTH))
    try:
        editors = head_scalers(reader, ["layer"])
    except ValueError as refused:
        if "modules=" not in str(refused):
            raise
        return
    query, key = (torch.linspace(low, 2.0, HEADS, dtype=torch.float64) for low in (0.25, 0.5))
    editors["layer"].scale(query, key)
    layer(*inputs)
    torch.testing.assert_close(layer.seen["q"], query[:, None, None] * before["q"])
    torch.testing.assert_close(layer.seen["k"], key[:, None, None] * before["k"])
    assert torch.equal(layer.seen["v"], before["v"])


def _largest(seen):
    key = seen["k"].repeat_interleave(seen["q"].shape[1] // seen["k"].shape[1], 1)
    return (seen["q"] @ key.mT * D_HEAD**-0.5).amax((0, 2, 3))


@pytest.mark.parametrize(
    "make",
    [
        *(
            lambda axes=axes, kinds=kinds: SweptAttention(Case(axes, kinds, "qkv_proj"))
            for axes in AXES
            for kinds in KINDS
        ),
        *(lambda store=store: SweptAttention(Case("hte", "qkv", "qkv", "sdpa", store)) for store in STORES),
        *(lambda cut=cut: SeparateSelfAttention(SEPARATE[3], cut, "sdpa", 2, bias=True) for cut in CUTS),
    ],
)
def test_the_largest_logit_after_a_clip_is_tau(make):
    model = _model(make)
    layer = model["layer"]
    inputs, before = _given(layer, (5, WIDTH))
    tau = 0.5 * float(_largest(before).min())
    clip_qk(model, {"layer": _largest(before)}, cap=tau, alpha=0.3)
    layer(*inputs)
    largest = _largest(layer.seen).view(before["k"].shape[1], -1).amax(1)
    torch.testing.assert_close(largest, torch.full_like(largest, tau), rtol=1e-4, atol=0)
    assert torch.equal(layer.seen["v"], before["v"])
