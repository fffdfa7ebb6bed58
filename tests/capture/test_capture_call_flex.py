"""flex_attention: block masks evaluated by chunk, tensors as score masks, against dense and real models."""

import call_oracle as oracle
import models
import pytest
import torch
from oracles import dense_attention
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from lightning_qk.capture.call import AttentionCall, UnsupportedCallError
from lightning_qk.capture.captured import FunctionCall
from lightning_qk.functional import attention_statistics
from lightning_qk.functional import logits as module
from lightning_qk.functional.attention import attention_sums


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """flex_attention as Python: compiling its kernels takes a minute and computes the same."""
    from transformers.integrations import flex_attention as integration

    monkeypatch.setattr(
        torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, False
    )
    monkeypatch.setattr(
        integration,
        "compile_friendly_flex_attention",
        lambda query, key, value, training=False, **kwargs: integration.flex_attention(
            query, key, value, **kwargs
        ),
    )
    build = create_block_mask
    monkeypatch.setattr(
        "transformers.masking_utils.create_block_mask",
        lambda *args, **kwargs: build(*args, **{**kwargs, "_compile": False}),
    )


def batch(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, models.VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(1))


def call(mask, n: int = 200, m: int = 200, **options) -> AttentionCall:
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(2, heads, length, 8, generator=generator) for heads, length in ((4, n), (2, m)))
    return AttentionCall(nn.Module(), query, key, torch.zeros_like(key), mask, "flex_attention", options)


def statistics(given: AttentionCall, **kwargs):
    return attention_statistics(FunctionCall(given).logits(self_attention=True), **kwargs)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("kind", [models.bert, models.llama, models.mistral, models.gemma2])
def test_models_with_padding(kind, side):
    model = kind(attn_implementation="flex_attention").eval()
    mask = oracle.padding(side)
    inputs = {"input_ids": batch(), "attention_mask": mask}
    with torch.no_grad():
        got, problems = oracle.measure(model, **inputs)
    assert problems == {}
    keep = torch.ones(2, 12, dtype=torch.bool) if mask is None else mask.bool()
    for name, p in oracle.eager_maps(model, **inputs).items():
        oracle.assert_statistics(got[name], oracle.map_statistics(p, keep))


def test_position_bias_of_t5():
    # transformers' function indexes the bias by sequence, so that it takes one sequence at a time.
    model = models.t5(attn_implementation="flex_attention").eval()
    inputs = {"input_ids": batch(1), "decoder_input_ids": batch(1)[:, :9]}
    with torch.no_grad():
        got, problems = oracle.measure(model, **inputs)
    assert problems == {}
    for name, p in oracle.eager_maps(model, **inputs).items():
        oracle.assert_statistics(
            got[name], oracle.map_statistics(p, torch.ones(1, p.shape[2], dtype=torch.bool))
        )


def test_packed_sequences_of_a_model():
    model = models.llama(attn_implementation="flex_attention").eval()
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    inputs = {"input_ids": batch(1), "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        got, problems = oracle.measure(model, **inputs)
    assert problems == {}
    keep = torch.ones(1, 12, dtype=torch.bool)
    for name, p in oracle.eager_maps(model, **inputs).items():
        assert p[..., 5:, :5].abs().max() == 0
        oracle.assert_statistics(got[name], oracle.map_statistics(p, keep))


DOCUMENT = torch.arange(200).expand(2, -1) // torch.tensor([[70], [50]])
MASKS = {
    "causal": lambda b, h, q, k: q >= k,
    "documents": lambda b, h, q, k: (DOCUMENT[b, q] == DOCUMENT[b, k]) & (q >= k),
    "indexed twice": lambda b, h, q, k: (DOCUMENT[b][q] == DOCUMENT[b][k]) & (q >= k),
    "by head": lambda b, h, q, k: (q >= k) & (q - k < 20 * (h + 1)),
    "constant": lambda b, h, q, k: k < 77,
}


@pytest.mark.parametrize("rows", [None, 30])
@pytest.mark.parametrize("name", MASKS)
def test_block_masks(name, rows, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2 * 4 * 200 * 33)
    mask_mod = MASKS[name]
    heads = 4 if name == "by head" else None
    mask = create_block_mask(mask_mod, 2, heads, 200, 200, device="cpu", BLOCK_SIZE=32)
    given = call(mask)
    dense = create_mask(mask_mod, 2, 4, 200, 200, device="cpu")
    if rows is None:
        want = dense_attention(given.query, given.key, dense, padding=dense.any(1).any(1))
        oracle.assert_statistics(statistics(given), want)
        return
    generators = [torch.Generator().manual_seed(3) for _ in "ab"]
    got = statistics(given, rows=rows, generator=generators[0])
    want = attention_statistics(given.query, given.key, mask=dense, rows=rows, generator=generators[1])
    assert set(got) == set(want)
    oracle.assert_statistics(got, want)


def test_one_mask_for_all_sequences_and_lengths_that_fill_no_block():
    mask = create_block_mask(MASKS["causal"], None, None, 100, 70, device="cpu")
    given = call(mask, 100, 70)
    visible = (torch.arange(100)[:, None] >= torch.arange(70))[None, None]
    oracle.assert_statistics(statistics(given), dense_attention(given.query, given.key, visible))


def test_blocks_that_are_not_listed_are_hidden():
    # As the kernels have it: only the first 128 keys, whatever mask_mod says of the others.
    counts = torch.ones(1, 1, 2, dtype=torch.int32)
    indices = torch.tensor([[[[0, 1], [0, 1]]]], dtype=torch.int32)
    given = call(BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128), 256, 256)
    visible = (torch.arange(256) < 128).expand(1, 1, 256, 256)
    # Keys that nobody sees are padding, and so are their queries.
    want = dense_attention(given.query, given.key, visible, padding=visible[:, 0, 0].expand(2, -1))
    oracle.assert_statistics(statistics(given), want)
    # A block listed as full is seen without asking.
    hidden = BlockMask.from_kv_blocks(
        0 * counts, indices, counts, indices, BLOCK_SIZE=128, mask_mod=lambda b, h, q, k: k < 0
    )
    oracle.assert_statistics(statistics(given._replace(attention_mask=hidden)), want)


def test_tensor_masks_are_added_from_their_first_head():
    scores = torch.randn(2, 4, 20, 25).masked_fill(torch.rand(2, 1, 20, 25) < 0.3, -torch.inf)
    given = call(scores, 20, 20, softcap=2.0, s_aux=torch.tensor([0.0, 1.0, 2.0, 3.0]))
    first = scores[:, :1, :, :20]
    want = dense_attention(
        given.query,
        given.key,
        first > -torch.inf,
        bias=first.clamp_min(-1e4),
        softcap=2.0,
        sinks=given.options["s_aux"],
    )
    oracle.assert_statistics(statistics(given), want)


def test_no_mask_is_no_causality():
    module = nn.Module()
    module.is_causal = True
    given = call(None, 20, 20, is_causal=True)._replace(module=module)
    oracle.assert_statistics(statistics(given), dense_attention(given.query, given.key))


def test_a_cache():
    mask = create_block_mask(lambda b, h, q, k: q + 12 >= k, None, None, 8, 32, device="cpu")
    given = call(mask, 8, 32)
    visible = (torch.arange(8)[:, None] + 12 >= torch.arange(32))[None, None]
    want = dense_attention(given.query, given.key, visible, offset=12)
    oracle.assert_statistics(statistics(given), want)


def test_masks_of_another_form_are_refused():
    with pytest.raises(UnsupportedCallError, match=r"flex_attention.*additive floating mask.*torch\.bool"):
        statistics(call(torch.ones(2, 1, 20, 20, dtype=torch.bool), 20, 20))
    with pytest.raises(UnsupportedCallError, match=r"expected a BlockMask.*str"):
        statistics(call("causal", 20, 20))
    short = create_block_mask(MASKS["causal"], None, None, 10, 10, device="cpu")
    with pytest.raises(UnsupportedCallError, match=r"a BlockMask of at least \(20, 20\)"):
        statistics(call(short, 20, 20))


def test_memory_is_that_of_chunks(monkeypatch):
    """No tensor is ever as large as the map."""
    n, largest = 1024, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1 << 16)
    given = call(create_block_mask(MASKS["causal"], None, None, n, n, device="cpu"), n, n)
    with Watch():
        attention_sums(FunctionCall(given).logits(self_attention=True), rows=16)
    assert largest < n * n / 4
