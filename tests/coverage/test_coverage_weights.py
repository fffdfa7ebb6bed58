"""The check of weights: it passes what is right, and fails what is wrong in any one respect."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from coverage_toys import traced

from lightning_qk.coverage.weights import verify_weights
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.heads.reader import head_projections

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
