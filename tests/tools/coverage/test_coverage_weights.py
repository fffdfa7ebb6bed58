"""The check of weights: it passes what is right, and fails what is wrong in any one respect."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from coverage_toys import traced
from torch import nn

from lightning_qk.heads.projections import HeadProjections
from lightning_qk.heads.reader import head_projections
from lightning_qk.verification.trace import Event, Product, Trace
from tools.coverage.weights import verify_weights

TYPES = ("bert", "gpt2", "llama", "qwen3", "t5", "deepseek_v2", "falcon", "vit")


@pytest.mark.parametrize("model_type", TYPES)
def test_what_is_right_is_verified(model_type: str) -> None:
    model, events = traced(model_type)
    read = head_projections(model)
    assert read
    for name, own in events.items():
        verdict = verify_weights(read[name], own)
        assert verdict.verified, (name, verdict.reason)


def _turn(values: torch.Tensor | None, axis: int) -> torch.Tensor | None:
    return None if values is None else values.roll(1, axis)


def _sides_swapped(read: HeadProjections) -> HeadProjections:
    return replace(
        read,
        query=read.key.repeat_interleave(read.heads // read.kv_heads, 0),
        query_bias=read.key_bias,
        key=read.query[:: read.heads // read.kv_heads],
        key_bias=read.query_bias,
    )


WRONG: dict[str, Callable[[HeadProjections], HeadProjections]] = {
    "heads in another order": lambda r: replace(
        r, query=_turn(r.query, 0), query_bias=_turn(r.query_bias, 0)
    ),
    "key heads in another order": lambda r: replace(r, key=_turn(r.key, 0), key_bias=_turn(r.key_bias, 0)),
    "rows of a head in another order": lambda r: replace(
        r, query=_turn(r.query, 1), query_bias=_turn(r.query_bias, 1)
    ),
    "rows of both in another order": lambda r: replace(
        r,
        query=_turn(r.query, 1),
        query_bias=_turn(r.query_bias, 1),
        key=_turn(r.key, 1),
        key_bias=_turn(r.key_bias, 1),
    ),
    "columns in another order": lambda r: replace(r, query=_turn(r.query, 2)),
    "queries and keys exchanged": _sides_swapped,
    "one weight off by a hundredth": lambda r: replace(r, key=r.key + 0.01 * r.key.abs().max() * _one(r.key)),
    "one sign": lambda r: replace(
        r, query=-r.query, query_bias=None if r.query_bias is None else -r.query_bias
    ),
}


def _one(like: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(like)
    out[0, 0] = 1
    return out


@pytest.mark.parametrize(
    ("model_type", "wrong"),
    [
        *((model_type, wrong) for model_type in ("bert", "gpt2", "llama") for wrong in WRONG),
        ("qwen3", "heads in another order"),
        ("qwen3", "rows of both in another order"),
        ("falcon", "heads in another order"),
        ("deepseek_v2", "one weight off by a hundredth"),
    ],
)
def test_what_is_wrong_is_not_verified(model_type: str, wrong: str) -> None:
    model, events = traced(model_type)
    read = head_projections(model)
    name, own = next(iter(events.items()))
    assert verify_weights(read[name], own).verified
    spoiled = WRONG[wrong](read[name])
    assert not verify_weights(spoiled, own).verified


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_a_dropped_bias_and_a_wrong_scaling_are_not_verified(model_type: str) -> None:
    model, events = traced(model_type)
    name, own = next(iter(events.items()))
    read = head_projections(model)[name]
    for spoiled in (
        replace(read, query_bias=None),
        replace(read, key_bias=None),
        replace(read, query_bias=read.key_bias, key_bias=read.query_bias),
        replace(read, scaling=read.scaling * 1.01),
    ):
        assert not verify_weights(spoiled, own).verified
    assert "scaled by" in verify_weights(replace(read, scaling=1.0), own).reason


def test_a_norm_between_is_not_taken_for_none() -> None:
    model, events = traced("qwen3")
    name, own = next(iter(events.items()))
    read = head_projections(model)[name]
    assert read.qk_norm
    assert not verify_weights(replace(read, qk_norm=False), own).verified


@pytest.mark.slow
def test_the_offset_of_a_layer_norm_is_found() -> None:
    model, events = traced("chameleon")
    read = head_projections(model)
    names = [name for name in events if name.endswith("self_attn")]
    assert names
    for name in names:
        assert read[name].qk_norm
        assert verify_weights(read[name], events[name]).verified
        turned = replace(read[name], query=read[name].query.roll(1, 1))
        assert not verify_weights(turned, events[name]).verified


def _own(model_type: str) -> tuple[HeadProjections, list[Event]]:
    """The first layer whose projections were read of a toy, and what it received."""
    model, events = traced(model_type)
    read = head_projections(model)
    name = next(name for name in events if name in read)
    return read[name], events[name]


PARTS = {
    "packed sequences": "muse_glimmer_vision",
    "packed sequences, normalized": "glm_ocr_vision",
    "further keys": "t5gemma2_decoder",
}


@pytest.mark.parametrize("model_type", PARTS.values(), ids=PARTS.keys())
def test_what_is_received_in_parts_or_multiplied_is_verified_and_can_fail(model_type: str) -> None:
    read, own = _own(model_type)
    verdict = verify_weights(read, own)
    assert verdict.verified, verdict.reason
    assert not verify_weights(WRONG["one weight off by a hundredth"](read), own).verified


@pytest.mark.slow
def test_a_gain_behind_the_rotation_is_part_of_the_reading() -> None:
    read, own = _own("hunyuan_v1_dense")
    norm = own[0].frames[-1].module.query_layernorm
    assert verify_weights(read, own).verified
    assert not verify_weights(replace(read, query=read.query / norm.weight.detach()[:, None]), own).verified


def test_further_keys_are_not_the_own_ones_of_cross_attention() -> None:
    read, own = _own("t5gemma2_decoder")
    assert not verify_weights(replace(read, self_attention=False), own).verified


def _turned_apart() -> tuple[HeadProjections, list[Event]]:
    """A layer that rotates each sequence by other angles: those of key points in an image."""
    model, events = traced("lightglue")
    name = next(name for name in events if name.endswith("self_attention"))
    return head_projections(model)[name], events[name]


@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_a_rotation_of_each_sequence_is_verified_and_can_fail(wrong: str | None) -> None:
    read, own = _turned_apart()
    read = read if wrong is None else WRONG[wrong](read)
    assert verify_weights(read, own).verified == (wrong is None)


def test_a_rotation_of_each_sequence_must_turn_queries_and_keys_alike() -> None:
    read, own = _turned_apart()
    assert not verify_weights(replace(read, position="none"), own).verified
    (product,) = own[0].products
    reflected = Product(
        product.query, product.key.flip(-1), product.query_node, product.key_node, product.scale
    )
    verdict = verify_weights(read, [Event(own[0].frames, [reflected], own[0].probabilities)])
    assert not verdict.verified
    assert "turned alike" in verdict.reason
    assert "scaled by" in verify_weights(replace(read, scaling=1.01 * read.scaling), own).reason


@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_a_rotation_of_some_heads_is_verified_and_can_fail(wrong: str | None) -> None:
    read, own = _own("qwen2_5_omni_dit")
    read = read if wrong is None else WRONG[wrong](read)
    assert verify_weights(read, own).verified == (wrong is None)


@pytest.mark.slow
def test_several_gains_behind_the_rotation_are_part_of_the_reading() -> None:
    read, own = _own("timesfm2_5")
    module = own[0].frames[-1].module
    assert verify_weights(read, own).verified
    for gain in (module.q_norm.weight, torch.nn.functional.softplus(module.scaling)):
        assert not verify_weights(replace(read, query=read.query / gain.detach()[:, None]), own).verified


def test_an_input_in_another_order_is_another_input() -> None:
    model, events = traced("lightglue")
    read = head_projections(model)
    names = [name for name in events if name.endswith("cross_attention")]
    assert names
    for name in names:
        assert verify_weights(read[name], events[name]).verified
        assert not verify_weights(replace(read[name], key=read[name].key.roll(1, 2)), events[name]).verified


class _Small(nn.Module):
    """An attention that multiplies its queries by a number a token, and attends both ways by one product."""

    def __init__(self, factor: torch.Tensor, *, both_ways: bool = False) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(24, 32), nn.Linear(24, 32)
        self.factor, self.both_ways = factor, both_ways

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2) * self.factor
        k = self.k(y).unflatten(-1, (4, 8)).transpose(1, 2)
        logits = q @ k.transpose(-1, -2)
        seen = logits.softmax(-1).sum()
        return seen + logits.transpose(-1, -2).softmax(-1).sum() if self.both_ways else seen

    def read(self) -> HeadProjections:
        query, key = (part.weight.detach().unflatten(0, (4, 8)) for part in (self.q, self.k))
        biases = (part.bias.detach().unflatten(0, (4, 8)) for part in (self.q, self.k))
        return HeadProjections(
            query, key, *biases, scaling=1.0, layout="q_proj, k_proj", self_attention=False
        )


def _events_of(model: nn.Module) -> list[Event]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 24, generator=generator) for n in (7, 5))
    with torch.no_grad(), Trace(model) as trace:
        model(x, y)
    return trace.events


def test_a_positive_factor_of_each_token_is_left_out_and_no_other_one() -> None:
    by_token = torch.linspace(0.5, 2, 7)[:, None]
    model = _Small(by_token)
    events = _events_of(model)
    assert verify_weights(model.read(), events).verified
    for wrong in WRONG.values():
        assert not verify_weights(wrong(model.read()), events).verified
    model = _Small(by_token - 1)
    assert not verify_weights(model.read(), _events_of(model)).verified


def test_a_second_softmax_of_the_transposed_product_has_the_same_q_and_k() -> None:
    model = _Small(torch.tensor(2.0), both_ways=True)
    events = _events_of(model)
    assert len(events) == 2
    read = replace(model.read(), scaling=2.0)
    assert verify_weights(read, events).verified
    assert not verify_weights(read, events[1:]).verified
    for name, wrong in WRONG.items():
        # Either side asks the other.
        assert verify_weights(wrong(read), events).verified == (name == "queries and keys exchanged"), name
