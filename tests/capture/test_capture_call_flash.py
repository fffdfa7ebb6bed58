"""Flash attention as transformers calls it: padding, windows, packing, caches, by dense kernels."""

import call_oracle as oracle
import models
import pytest
import torch
from call_oracle import flash_attn_func, flash_attn_varlen_func
from oracles import dense_attention
from torch import nn
from transformers.integrations.flash_attention import flash_attention_forward

from lightning_qk.capture.call import AttentionCall, UnsupportedCallError
from lightning_qk.capture.captured import FunctionCall
from lightning_qk.functional import attention_statistics


@pytest.fixture(autouse=True)
def kernels():
    with oracle.flash_stand_in():
        yield


def batch(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, models.VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(1))


class Layer(nn.Module):
    """What an attention layer is to the function that it calls."""

    def __init__(self, is_causal: bool = True, **attributes):
        super().__init__()
        self.is_causal = is_causal
        self.weight = nn.Linear(2, 2)
        self.config = type("Config", (), {"_attn_implementation": "flash_attention_2"})()
        for name, value in attributes.items():
            setattr(self, name, value)


def call(n=9, m=9, mask=None, module=None, rows=2, function=flash_attention_forward, **options):
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        2 * torch.randn(rows, heads, length, 8, generator=generator)
        for heads, length in ((4, n), (2, m), (2, m))
    )
    options = {"scaling": 0.5, "dropout": 0.0, **options}
    return AttentionCall(module or Layer(), query, key, value, mask, "flash_attention_2", options, function)


def statistics(given: AttentionCall, self_attention: bool = True):
    return attention_statistics(FunctionCall(given).logits(self_attention=self_attention))


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("kind", [models.llama, models.mistral, models.bert, models.gemma2, models.gpt_oss])
def test_models_with_padding(kind, side):
    model = oracle.as_flash(kind(attn_implementation="eager")).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    mask = oracle.padding(side)
    inputs = {"input_ids": batch(), "attention_mask": mask}
    with torch.no_grad():
        got, problems = oracle.measure(model, **inputs)
    assert problems == {}
    keep = torch.ones(2, 12, dtype=torch.bool) if mask is None else mask.bool()
    for name, p in oracle.eager_maps(model, **inputs).items():
        want = oracle.map_statistics(p, keep, sink=kind is models.gpt_oss)
        oracle.assert_statistics(got[name], want)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right", "hole"])
def test_padding_is_taken_out_first(side, is_causal, window):
    mask = oracle.padding(side, length=9, hidden=3)
    given = call(mask=mask.bool(), module=Layer(is_causal), sliding_window=window)
    keep = mask.bool()
    place = keep.cumsum(1) - 1
    ahead = place[:, None, :] - place[:, :, None]
    visible = keep[:, None, :] & keep[:, :, None]
    if is_causal:
        visible = visible & (ahead <= 0)
    if window is not None:
        visible = visible & (ahead.abs() < window)
    want = dense_attention(given.query, given.key, visible[:, None], scaling=0.5, padding=keep)
    oracle.assert_statistics(statistics(given), want)


@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize("is_causal", [True, False, None])
@pytest.mark.parametrize(("n", "m"), [(9, 9), (3, 9), (1, 9), (9, 4)])
def test_lengths_flags_and_windows(n, m, is_causal, window):
    given = call(n, m, is_causal=is_causal, sliding_window=window)
    place = torch.arange(n)[:, None] + m - n
    ahead = torch.arange(m) - place
    visible = torch.ones(n, m, dtype=torch.bool) if is_causal is False else ahead <= 0
    if window is not None and m > window:
        visible = visible & (ahead.abs() < window)
    offset = m - n if is_causal is not False or n < m else 0
    if is_causal is False and window is not None and m > window:
        offset = m - n
    want = dense_attention(given.query, given.key, visible[None, None], scaling=0.5, offset=offset)
    oracle.assert_statistics(statistics(given), want)
    # The same by the implementation's name alone, where no other reading can stand in.
    oracle.assert_statistics(statistics(given._replace(function=None)), want)


def test_newest_queries_with_left_padding_and_a_static_cache():
    # Queries are the last three of nine tokens; the cache has room for twelve.
    mask = oracle.padding("left", length=9)
    given = call(3, 12, mask=mask)
    i, j = torch.arange(3)[:, None], torch.arange(12)
    visible = (j <= i + 6)[None] & torch.nn.functional.pad(mask.bool(), (0, 3))[:, None, :]
    want = dense_attention(given.query, given.key, visible[:, None], scaling=0.5, offset=6)
    oracle.assert_statistics(statistics(given), want)


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("window", [None, 2])
def test_packed_sequences(how, window):
    if how == "position_ids":
        options = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])}
    else:
        starts = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
        options = {
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": 4,
            "max_length_k": 4,
        }
    given = call(rows=1, sliding_window=window, **options)
    document = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    i, j = torch.arange(9)[:, None], torch.arange(9)
    visible = (document[:, None] == document) & (j <= i)
    if window is not None:
        visible = visible & (i - j < window)
    want = dense_attention(given.query, given.key, visible[None, None], scaling=0.5)
    oracle.assert_statistics(statistics(given), want)


@pytest.mark.parametrize("tried", [True, False])
def test_packed_queries_fewer_than_their_keys(tried):
    options = {
        "cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 4, 9], dtype=torch.int32),
        "max_length_q": 3,
        "max_length_k": 5,
    }
    given = call(5, 9, rows=1, **options)
    if not tried:
        given = given._replace(function=None)
    visible = torch.zeros(5, 9, dtype=torch.bool)
    visible[:2, :4] = torch.ones(2, 4).tril(2).bool()
    visible[2:, 4:] = torch.ones(3, 5).tril(2).bool()
    want = dense_attention(given.query, given.key, visible[None, None], scaling=0.5)
    oracle.assert_statistics(statistics(given, self_attention=False), want)


def test_packed_sequences_that_span_the_batch():
    # Two rows of nine tokens flattened: sequences of 4, 9 and 3, and two tokens outside of all.
    starts = torch.tensor([0, 4, 13, 16], dtype=torch.int32)
    options = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 9, "max_length_k": 9}
    given = call(**options)
    document = torch.tensor([0] * 4 + [1] * 9 + [2] * 3 + [-1] * 2)
    i, j = torch.arange(18)[:, None], torch.arange(18)
    visible = (document[:, None] == document) & (j <= i) & (document >= 0)
    query, key = (
        tensor.transpose(1, 2).reshape(1, 18, -1, 8).transpose(1, 2) for tensor in (given.query, given.key)
    )
    want = dense_attention(query, key, visible[None, None], scaling=0.5)
    oracle.assert_statistics(statistics(given), want)


def test_soft_cap_and_learnt_sinks():
    sinks = torch.tensor([-1.0, 0.0, 2.0, 5.0])
    given = call(softcap=4.0, s_aux=sinks)
    visible = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    want = dense_attention(given.query, given.key, visible, scaling=0.5, softcap=4.0, sinks=sinks)
    oracle.assert_statistics(statistics(given), want)


def test_sinks_that_the_kernel_does_not_know_are_not_measured(monkeypatch):
    from transformers import modeling_flash_attention_utils as utils

    def without_sinks(*args, s_aux=None, **kwargs):
        return flash_attn_func(*args, **kwargs)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
        raise AssertionError("not called")

    monkeypatch.setattr(utils, "_flash_fn", without_sinks)
    monkeypatch.setattr(utils, "_process_flash_kwargs_fn", utils._lazy_define_process_function(varlen))
    given = call(s_aux=torch.full((4,), 3.0))
    visible = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    got = statistics(given)
    assert "sink_learnt" not in got
    oracle.assert_statistics(got, dense_attention(given.query, given.key, visible, scaling=0.5))


def test_without_the_function_it_is_read_by_its_name():
    given = call(mask=oracle.padding("left", length=9), function=None)
    oracle.assert_statistics(statistics(given), statistics(given._replace(function=flash_attention_forward)))
    hub = given._replace(implementation="kernels-community/vllm-flash-attn3")
    oracle.assert_statistics(statistics(hub), statistics(given))


def test_chunks_and_odd_masks_are_refused():
    module = Layer()
    module.config.attention_chunk_size = 4
    with pytest.raises(UnsupportedCallError, match="chunks of 4 keys"):
        statistics(call(module=module, function=None))
    module.config.layer_types, module.layer_idx = ["chunked_attention", "full_attention"], 1
    statistics(call(module=module, function=None))
    with pytest.raises(UnsupportedCallError, match=r"flash_attention_2.*padding mask \(batch, m\)"):
        statistics(call(mask=torch.zeros(2, 1, 9, 9), function=None))
    with pytest.raises(UnsupportedCallError, match="paged cache"):
        statistics(call(block_table=torch.zeros(1)))
    with pytest.raises(UnsupportedCallError, match="paged cache"):
        statistics(call()._replace(implementation="paged|sdpa"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [(-1, -1), (4, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_stand_in_is_what_the_package_computes(causal, window):
    package = pytest.importorskip("flash_attn")
    q, k, v = (torch.randn(2, n, 4, 64, device="cuda", dtype=torch.bfloat16) for n in (9, 17, 17))
    options = {"causal": causal, "window_size": window, "softcap": 5.0}
    want = flash_attn_func(q.cpu(), k.cpu(), v.cpu(), **options)
    torch.testing.assert_close(package.flash_attn_func(q, k, v, **options).cpu(), want, rtol=0.02, atol=0.02)
    starts = torch.tensor([0, 5, 17], dtype=torch.int32)
    options |= {"max_seqlen_q": 12, "max_seqlen_k": 12}
    packed = [tensor[0] for tensor in (k, k, v)]
    got = package.flash_attn_varlen_func(*packed, starts.cuda(), starts.cuda(), **options)
    want = flash_attn_varlen_func(*(tensor.cpu() for tensor in packed), starts, starts, **options)
    torch.testing.assert_close(got.cpu(), want, rtol=0.02, atol=0.02)
