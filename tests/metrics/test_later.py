"""Measurements that wait for others of their shape give what each gives alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qk.functional.attention import AttentionSums, attention_sums
from lightning_qk.functional.hidden import hidden_sums
from lightning_qk.functional.logits import AttentionLogits, ProductLogits
from lightning_qk.metrics.collector import SumAccumulator
from lightning_qk.metrics.hidden import with_heads
from lightning_qk.metrics.later import Waiting, attention_later, hidden_later


def _close(found: Any, expected: Any) -> None:
    for name, part in expected._asdict().items():
        whole = part.amax(1, keepdim=True) if name == "maximum" else part.sum(1, keepdim=True)
        torch.testing.assert_close(getattr(found, name), whole, rtol=1e-5, atol=1e-6, equal_nan=True)


def _all_rows(logits: AttentionLogits) -> AttentionSums:
    return attention_sums(logits)


@st.composite
def calls(draw: st.DrawFn) -> list[ProductLogits]:
    """Calls of several layers, of one or two shapes, with all that a call may have."""
    number = draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shapes = [
        (draw(st.integers(1, 3)), draw(st.sampled_from([(2, 2), (4, 2), (4, 1)])), draw(st.integers(2, 7)))
        for _ in range(2)
    ]
    kind = draw(st.sampled_from(["none", "causal", "window", "padding", "additive", "shared", "function"]))
    softcap = draw(st.sampled_from([None, 5.0]))
    out = []
    for _ in range(number):
        batch, (heads, kv_heads), n = draw(st.sampled_from(shapes))
        options: dict[str, Any] = {"softcap": softcap}
        length = torch.randint(1, n + 1, (batch, 1), generator=generator)
        shown = torch.arange(n) < length
        if kind in ("causal", "window"):
            options["is_causal"] = True
        if kind == "window":
            options["sliding_window"] = 2
        if kind == "padding":
            options |= {"mask": shown[:, None, None], "query_mask": shown}
        if kind == "additive":
            options["mask"] = torch.where(shown, 0.5, -torch.inf)[:, None, None].expand(-1, heads, n, -1)
        if kind == "shared":
            options["mask"] = torch.ones(n, n, dtype=torch.bool).tril()
        if kind == "function":
            options["mask"] = lambda batch, head, query, key: key <= query
        query = 3 * torch.randn(batch, heads, n, 4, generator=generator)
        out.append(
            AttentionLogits.of(query, torch.randn(batch, kv_heads, n, 4, generator=generator), **options)
        )
    return out


@settings(max_examples=40, deadline=None)
@given(calls())
def test_together_as_alone(layers: list[ProductLogits]) -> None:
    waiting, waited = Waiting(), {}
    for name, logits in enumerate(layers):
        later = attention_later(logits, "all", _all_rows)
        if later is None:
            assert callable(logits.mask)  # what cannot be put side by side
            continue
        waiting.add(name, later)
        waited[name] = attention_sums(logits)
    found = dict(waiting.make())
    assert found.keys() == waited.keys()
    for name, expected in waited.items():
        _close(found[name], expected)
    assert not list(waiting.make())


@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_together_as_alone(masked: bool) -> None:
    states = torch.randn(3, 2, 6, 5)
    masks = [torch.rand(2, 6) > 0.3 if masked else None for _ in states]
    waiting = Waiting()
    for name, (one, mask) in enumerate(zip(states, masks, strict=True)):
        later = hidden_later(one, mask, tokens=None, sequences=None, generator=None)
        assert later is not None
        waiting.add(name, later)
    for (_, found), one, mask in zip(waiting.make(), states, masks, strict=True):
        _close(found, with_heads(hidden_sums(one, mask=mask)))


def test_drawn_sequences_stand_for_all() -> None:
    waiting = Waiting()
    later = hidden_later(torch.ones(6, 4, 3), None, tokens=None, sequences=2, generator=None)
    assert later is not None
    waiting.add("a", later)
    ((_, found),) = waiting.make()
    torch.testing.assert_close(found.weight[0], torch.tensor([[6.0]]))


def test_what_a_model_writes_later_does_not_count() -> None:
    query, key = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    expected = attention_sums(query, key, mask=mask)
    later = attention_later(AttentionLogits.of(query, key, mask=mask), "all", _all_rows)
    assert later is not None
    for tensor in (query, key, mask):
        tensor.zero_()
    waiting = Waiting()
    waiting.add("a", later)
    ((_, found),) = waiting.make()
    _close(found, expected)


def test_large_calls_do_not_wait_and_small_ones_do_not_pile_up() -> None:
    large = torch.zeros(1, 1, 1 << 19, 1)
    assert attention_later(AttentionLogits.of(large, large), "all", _all_rows) is None
    assert hidden_later(torch.zeros(0, 3, 4), None, tokens=None, sequences=None, generator=None) is None
    pool, most = SumAccumulator(), 0
    small = AttentionLogits.of(torch.randn(1, 1, 1024, 64), torch.randn(1, 1, 1024, 64))

    def few(logits: ProductLogits) -> AttentionSums:
        nonlocal most
        most = max(most, logits.shape[0])
        return attention_sums(logits, rows=2)

    for index in range(40):
        later = attention_later(small, "all", few)
        assert later is not None
        pool.add(f"layer{index}", later)
    assert 2 <= most <= 16  # 2 Mi numbers
    assert len(pool.sums()) == 40


def test_one_that_fails_is_lost_alone() -> None:
    def fails(logits: ProductLogits) -> AttentionSums:
        if bool((logits.query == 7).any()):
            raise RuntimeError("no memory")
        return attention_sums(logits)

    pool = SumAccumulator()
    tensors = {"a": torch.randn(1, 1, 3, 2), "b": torch.full((1, 1, 3, 2), 7.0), "c": torch.randn(1, 1, 3, 2)}
    for name, tensor in tensors.items():
        later = attention_later(AttentionLogits.of(tensor, tensor), "all", fails)
        assert later is not None
        pool.add(name, later)
    assert pool.names == {"a", "b", "c"}
    assert pool.sums().keys() == {"a", "c"}
    assert pool.lost == {"b": "measuring it failed (RuntimeError: no memory)"}
    _close(pool.sums()["a"], attention_sums(tensors["a"], tensors["a"]))


def test_some_of_the_heads_on_each_process() -> None:
    tensor = torch.randn(2, 1, 3, 2)
    later = attention_later(AttentionLogits.of(tensor, tensor), "all", _all_rows)
    assert later is not None
    pool = SumAccumulator()
    pool.add("a", later, heads=3, where=slice(1, 2))
    found: Tensor = pool.sums()["a"].weight
    assert found.shape[-1] == 3
    assert (found[0, 0] > 0).tolist() == [False, True, False]


def test_layers_that_are_left_out_do_not_wait() -> None:
    tensor = torch.randn(1, 1, 3, 2)
    later = attention_later(AttentionLogits.of(tensor, tensor), "all", _all_rows)
    assert later is not None
    pool = SumAccumulator()
    pool.add("a", later)
    pool.add("b", later)
    pool.leave_out(["a"])
    assert pool.sums().keys() == {"b"}
    pool.add("b", later)
    pool.reset()
    assert not pool.sums()
