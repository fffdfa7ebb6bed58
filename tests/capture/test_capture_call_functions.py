"""Attention functions of unknown meaning: accepted where their output is what is measured, refused else."""

import gc

import call_oracle as oracle
import models
import pytest
import torch
import torch.nn.functional as F
import transformers
from oracles import dense_attention
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sink_attention
from transformers.models.llama4.modeling_llama4 import vision_eager_attention_forward

from lightning_qk.capture import verify
from lightning_qk.capture.call import AttentionCall, UnsupportedCallError
from lightning_qk.capture.captured import FunctionCall
from lightning_qk.functional import attention_statistics
from lightning_qk.heads.reader import find_attention


def batch(length: int = 12) -> torch.Tensor:
    return torch.randint(3, models.VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def repeat(query, *tensors):
    return (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in tensors)


def logits_of(query, key, scaling):
    return query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)


# What users may write.


def by_mapping(module, query, key, value, attention_mask, **kwargs):
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


def by_torch(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    key, value = repeat(query, key, value)
    causal = attention_mask is None and query.shape[2] > 1
    output = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout_p=dropout, scale=scaling, is_causal=causal
    )
    return output.transpose(1, 2).contiguous(), None


def bidirectional(module, query, key, value, attention_mask, scaling=None, **kwargs):
    key, value = repeat(query, key, value)
    return (logits_of(query, key, scaling).softmax(-1) @ value).transpose(1, 2), None


def with_window(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    key, value = repeat(query, key, value)
    ahead = torch.arange(key.shape[2]) - torch.arange(query.shape[2])[:, None]
    hidden = (ahead > 0) | (ahead <= -(sliding_window or key.shape[2]))
    output = logits_of(query, key, scaling).masked_fill(hidden, -torch.inf).softmax(-1) @ value
    return output.transpose(1, 2), None


def by_padding(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal, a mask (batch, m) of what to keep, and heads flattened in what it returns."""
    key, value = repeat(query, key, value)
    n, m = query.shape[2], key.shape[2]
    hidden = ~torch.ones(n, m, dtype=torch.bool).tril(m - n)
    if attention_mask is not None:
        hidden = hidden | ~attention_mask[:, None, None, :].bool()
    output = logits_of(query, key, scaling).masked_fill(hidden, -1e9).softmax(-1) @ value
    return output.transpose(1, 2).flatten(2), None


def own_dropout(module, query, key, value, attention_mask, scaling=None, **kwargs):
    key, value = repeat(query, key, value)
    p = logits_of(query, key, scaling) + (0.0 if attention_mask is None else attention_mask)
    p = F.dropout(p.softmax(-1), 0.5, training=module.training)
    return (p @ value).transpose(1, 2), None


def writes_into_its_mask(module, query, key, value, attention_mask, scaling=None, **kwargs):
    key, value = repeat(query, key, value)
    attention_mask += logits_of(query, key, scaling).detach()[:, :1] * 0 - 1.0
    p = (logits_of(query, key, scaling) + attention_mask).softmax(-1)
    return (p @ value).transpose(1, 2), None


# What is no softmax attention of what was given.


def linear(module, query, key, value, attention_mask, scaling=None, **kwargs):
    key, value = repeat(query, key, value)
    p = (query.relu() @ key.relu().mT + 1e-3).tril()
    return (p / p.sum(-1, keepdim=True) @ value).transpose(1, 2), None


def sparse(module, query, key, value, attention_mask, scaling=None, **kwargs):
    key, value = repeat(query, key, value)
    p = logits_of(query, key, scaling).masked_fill(
        ~torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(), -torch.inf
    )
    p = p.masked_fill(p < p.topk(3, dim=-1).values[..., -1:], -torch.inf)
    return (p.softmax(-1) @ value).transpose(1, 2), None


def with_alibi(module, query, key, value, attention_mask, scaling=None, **kwargs):
    key, value = repeat(query, key, value)
    ahead = torch.arange(key.shape[2]) - torch.arange(query.shape[2])[:, None]
    p = (logits_of(query, key, scaling) + 0.5 * ahead).masked_fill(ahead > 0, -torch.inf).softmax(-1)
    return (p.to(value.dtype) @ value).transpose(1, 2), None


def measure(function, kind=models.llama, masks=None, mode=False, **inputs):
    with oracle.registered(mine=function), pytest.MonkeyPatch.context() as patch:
        if masks is not None:
            patch.setitem(
                ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "mine", ALL_MASK_ATTENTION_FUNCTIONS[masks]
            )
        model = kind(attn_implementation="eager").train(mode)
        model.config._attn_implementation_internal = "mine"
        with torch.no_grad():
            return (*oracle.measure(model, input_ids=batch(), **inputs), model)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize(
    ("function", "masks"),
    [
        (by_mapping, "sdpa"),
        (by_torch, "sdpa"),
        (by_torch, "eager"),
        (by_padding, "flash_attention_2"),
        (sdpa_attention_forward, "sdpa"),
        (sink_attention, "eager"),
    ],
)
def test_functions_with_masks_of_each_kind(function, masks, side):
    kind = models.gpt_oss if function is sink_attention else models.llama
    mask = oracle.padding(side)
    got, problems, model = measure(function, kind, masks, attention_mask=mask)
    assert problems == {}
    keep = torch.ones(2, 12, dtype=torch.bool) if mask is None else mask.bool()
    for name, p in oracle.eager_maps(model, input_ids=batch(), attention_mask=mask).items():
        oracle.assert_statistics(got[name], oracle.map_statistics(p, keep, sink=function is sink_attention))


@pytest.mark.parametrize("function", [by_mapping, by_torch, bidirectional, with_window])
def test_functions_without_a_mask_function_see_padding_as_they_do(function):
    # Without one, transformers hands no mask on even where there is padding.
    heard = []

    def listened(module, query, key, value, attention_mask, **kwargs):
        heard.append((query, key, attention_mask, kwargs))
        return function(module, query, key, value, attention_mask, **kwargs)

    got, problems, _ = measure(listened, models.mistral, attention_mask=oracle.padding("left"))
    assert problems == {}
    # The model's call, and one more at the first call of each layer to find out what it means.
    assert len(heard) == 4
    for statistics, (query, key, mask, kwargs) in zip(got.values(), heard[1::2], strict=True):
        assert mask is None
        ahead = torch.arange(12) - torch.arange(12)[:, None]
        visible = ahead <= 0 if function is not bidirectional else ahead < 12
        if function is with_window:
            visible = visible & (ahead > -5)
        want = dense_attention(query, key, visible[None, None], scaling=kwargs["scaling"])
        oracle.assert_statistics(statistics, want)


@pytest.mark.parametrize("function", [sparse, with_alibi])
def test_the_softmax_of_a_function_that_its_arguments_do_not_tell_is_observed(function):
    maps = []

    def listened(module, query, key, value, attention_mask, **kwargs):
        # The probabilities themselves, by values that tell each key.
        tell = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
        maps.append(function(module, query, key, tell, attention_mask, **kwargs)[0].transpose(1, 2))
        return function(module, query, key, value, attention_mask, **kwargs)

    got, problems, _ = measure(listened)
    assert problems == {}
    assert len(got) == 2
    # Each layer's first map is of the trial. A token that no row sees counts as padding.
    for statistics, p in zip(got.values(), maps[1::2], strict=True):
        oracle.assert_statistics(statistics, oracle.map_statistics(p, p.amax((1, 2)) > 0))


@pytest.mark.parametrize("function", [linear, None])
def test_what_is_no_softmax_of_its_arguments_is_refused(function):
    got, problems, _ = measure(function or of_no_shape_in_trials())
    assert got == {}
    assert len(problems) == 2
    for problem in problems.values():
        assert "attention function 'mine'" in problem
        assert "attn_implementation" in problem
        assert "\n" not in problem


def of_no_shape_in_trials():
    """Right whenever the model calls it, which comes second."""
    calls = []

    def function(module, *args, **kwargs):
        calls.append(module)
        output, weights = by_torch(module, *args, **kwargs)
        return (output.mean(), weights) if calls.count(module) == 1 else (output, weights)

    return function


def test_a_function_that_raises_in_the_trial_is_refused_and_the_model_runs():
    calls = []

    def fails_the_first_time(module, query, key, value, attention_mask, **kwargs):
        calls.append(module)
        if len(calls) == 1:
            raise RuntimeError("no kernel")
        return by_torch(module, query, key, value, attention_mask, **kwargs)

    got, problems, _ = measure(fails_the_first_time)
    assert len(got) == 1
    assert "no kernel" in next(iter(problems.values()))


def test_dropout_of_its_own_and_the_random_state():
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    got, problems, model = measure(own_dropout, masks="eager", mode=True)
    assert problems == {}
    assert all(module.training for module in model.modules())
    first = next(iter(got))
    # Hidden states of the second layer carry the dropout of the first.
    p = oracle.eager_maps(model, input_ids=batch())[first]
    oracle.assert_statistics(got[first], oracle.map_statistics(p, torch.ones(2, 12, dtype=torch.bool)))

    def run(listen):
        torch.manual_seed(3)
        with oracle.registered(mine=own_dropout):
            (oracle.measure if listen else lambda model, **kwargs: model(**kwargs))(model, input_ids=batch())
        return torch.rand(3)

    model.config._attn_implementation_internal = "mine"
    assert torch.equal(run(True), run(False))
    assert not torch.equal(run(True), want)


def test_what_a_function_writes_into_the_trial_stays_there():
    with oracle.registered(mine=writes_into_its_mask), pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "mine", ALL_MASK_ATTENTION_FUNCTIONS["eager"]
        )
        model = models.llama(attn_implementation="mine").train()

        def run(listen):
            model.zero_grad()
            if listen:
                _, problems = oracle.measure(model, input_ids=batch())
                assert problems == {}
            inputs = {"input_ids": batch(), "labels": batch()}
            output = model(**inputs)
            output.loss.backward()
            return [output.logits, *(parameter.grad.clone() for parameter in model.parameters())]

        heard, alone = run(True), run(False)
        assert all(torch.equal(a, b) for a, b in zip(heard, alone, strict=True))
        mask = torch.zeros(2, 1, 12, 12)
        given = AttentionCall(
            next(iter(find_attention(model).values())),
            *(torch.randn(2, heads, 12, 8) for heads in (4, 2, 2)),
            mask,
            "mine",
            {"scaling": 0.3},
            writes_into_its_mask,
        )
        FunctionCall(given).logits(self_attention=True)
        assert mask.abs().max() == 0


def test_it_is_tried_once_a_module_and_again_when_something_is_new():
    heard = []

    def listened(module, query, key, value, attention_mask, **kwargs):
        heard.append(tuple(query.shape))
        return with_window(module, query, key, value, attention_mask, sliding_window=8, **kwargs)

    module = nn.Module()
    module.sliding_window = 8

    def statistics(n, mask=None, module=module):
        generator = torch.Generator().manual_seed(n)
        query, key = (torch.randn(2, heads, n, 8, generator=generator) for heads in (4, 2))
        given = AttentionCall(module, query, key, key, mask, "mine", {"scaling": 0.3}, listened)
        got = attention_statistics(FunctionCall(given).logits(self_attention=True))
        ahead = torch.arange(n) - torch.arange(n)[:, None]
        visible = (ahead <= 0) & (ahead > -8)
        oracle.assert_statistics(got, dense_attention(query, key, visible[None, None], scaling=0.3))

    statistics(6)
    statistics(6)
    statistics(5)
    assert len(heard) == 1
    statistics(20)  # a window shows only now
    statistics(7)
    statistics(20)
    assert len(heard) == 2
    statistics(6, torch.zeros(2, 1, 6, 6))  # a mask, which it ignores
    assert len(heard) == 3
    count = len(verify._known)
    del statistics, module
    gc.collect()
    assert len(verify._known) < count


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_precisions(dtype):
    query, key = (3 * torch.randn(2, heads, 40, 16).to(dtype) for heads in (4, 2))

    def statistics(function):
        given = AttentionCall(nn.Module(), query, key, key, None, "mine", {"scaling": 0.3}, function)
        return attention_statistics(FunctionCall(given).logits(self_attention=True))

    visible = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    oracle.assert_statistics(statistics(by_torch), dense_attention(query, key, visible, scaling=0.3))
    for function in (linear, sparse, with_alibi):
        with pytest.raises(UnsupportedCallError, match="is not softmax attention"):
            statistics(function)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_the_arguments_is_left_out_of_the_trial(training):
    module = nn.Module().train(training)
    query, key = (torch.randn(2, 4, 20, 8) for _ in "qk")
    # torch's function drops whatever mode the module is in.
    given = AttentionCall(module, query, key, key, None, "mine", {"dropout": 0.5}, by_torch)
    got = attention_statistics(FunctionCall(given).logits(self_attention=True))
    visible = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    oracle.assert_statistics(got, dense_attention(query, key, visible))


def test_autocast_of_the_model_holds_in_the_trial():
    seen = []

    def function(module, query, key, value, attention_mask, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return by_torch(module, query, key, value, attention_mask, **kwargs)

    with torch.autocast("cpu", torch.bfloat16):
        _, problems, _ = measure(function)
    assert problems == {}
    assert seen == [True] * 4


class TestQuirks:
    def call(self, function, mask=None, name="eager", n=9, module=None, **options):
        generator = torch.Generator().manual_seed(4)
        query, key = (2 * torch.randn(2, 4, n, 8, generator=generator) for _ in "qk")
        module = module or nn.Module()
        module.num_key_value_groups, module.head_dim = 1, 8
        return AttentionCall(module, query, key, key, mask, name, options, function)

    def statistics(self, given):
        return attention_statistics(FunctionCall(given).logits(self_attention=True))

    def test_llama4_vision_ignores_the_scaling(self):
        given = self.call(vision_eager_attention_forward, scaling=0.9)
        want = dense_attention(given.query, given.key, scaling=8**-0.5)
        oracle.assert_statistics(self.statistics(given), want)

    def test_eager_ignores_the_flag_of_causality(self):
        module = nn.Module()
        module.is_causal = True
        given = self.call(
            transformers.models.bert.modeling_bert.eager_attention_forward,
            module=module,
            is_causal=True,
            scaling=0.4,
        )
        oracle.assert_statistics(self.statistics(given), dense_attention(given.query, given.key, scaling=0.4))

    def test_sdpa_ignores_sinks_and_reads_the_flag_first(self):
        module = nn.Module()
        module.is_causal, module.sinks = True, torch.ones(4)
        given = self.call(sdpa_attention_forward, name="sdpa", module=module, s_aux=module.sinks)
        visible = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
        got = self.statistics(given)
        assert "sink_learnt" not in got
        oracle.assert_statistics(got, dense_attention(given.query, given.key, visible))
        given = given._replace(options={"is_causal": False})
        oracle.assert_statistics(self.statistics(given), dense_attention(given.query, given.key))

    def test_a_name_says_nothing_of_a_function_registered_over_it(self):
        given = self.call(bidirectional, name="sdpa", scaling=0.4)
        oracle.assert_statistics(self.statistics(given), dense_attention(given.query, given.key, scaling=0.4))

    def test_masks_wider_than_the_keys(self):
        def sliced(module, query, key, value, attention_mask, scaling=None, **kwargs):
            mask = attention_mask[:, :, :, : key.shape[-2]]
            return ((logits_of(query, key, scaling) + mask).softmax(-1) @ value).transpose(1, 2), None

        visible = torch.ones(9, 14, dtype=torch.bool).tril()[None, None]
        mask = torch.zeros(1, 1, 9, 14).masked_fill(~visible, torch.finfo(torch.float32).min)
        given = self.call(sliced, mask, scaling=0.4)
        want = dense_attention(given.query, given.key, visible[..., :9], scaling=0.4)
        oracle.assert_statistics(self.statistics(given), want)

    @pytest.mark.parametrize(
        "mask",
        [
            torch.ones(9, 9, dtype=torch.bool).tril()[None, None],
            torch.ones(9, 9).tril().log(),
            torch.ones(2, 9, dtype=torch.long),
        ],
    )
    @pytest.mark.parametrize("tried", [True, False])
    def test_masks_that_eager_does_not_take(self, mask, tried):
        def eager(module, query, key, value, attention_mask, scaling=None, **kwargs):
            mask = attention_mask if attention_mask.shape[-2] == 9 else attention_mask[:, None, None]
            return ((logits_of(query, key, scaling) + mask).softmax(-1) @ value).transpose(1, 2), None

        given = self.call(eager if tried else None, mask)
        if tried and mask.dim() == 2 and mask.is_floating_point():  # the function itself made it clear
            visible = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
            oracle.assert_statistics(self.statistics(given), dense_attention(given.query, given.key, visible))
            return
        with pytest.raises(UnsupportedCallError, match=r"'eager'.*(softmax attention|additive floating)"):
            self.statistics(given)

    @pytest.mark.parametrize("additive", [True, False])
    def test_a_mask_of_padding_and_causality_of_its_own(self, additive):
        keep = oracle.padding("left", length=9).bool()[:, None, None, :]
        mask = torch.zeros(2, 1, 1, 9).masked_fill(~keep, -1e9) if additive else keep

        def function(module, query, key, value, attention_mask, scaling=None, **kwargs):
            causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
            p = logits_of(query, key, scaling).masked_fill(~causal, -1e9)
            p = p + attention_mask if additive else p.masked_fill(~attention_mask, -1e9)
            return (p.softmax(-1) @ value).transpose(1, 2), None

        given = self.call(function, mask, name="mine", scaling=0.4)
        visible = keep & torch.ones(9, 9, dtype=torch.bool).tril()
        want = dense_attention(given.query, given.key, visible, scaling=0.4, padding=keep[:, 0, 0])
        oracle.assert_statistics(self.statistics(given), want)

    @pytest.mark.parametrize("form", ["added", "kept", "padding"])
    def test_a_mask_that_the_function_does_not_heed(self, form):
        """Learnt at a call whose mask hides nothing that causality does not."""
        causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
        keep = oracle.padding("left", length=9).bool()
        module = nn.Module()

        def mask(visible):
            if form == "padding":
                return visible[:, 0, -1]
            visible = visible & causal
            return visible if form == "kept" else torch.zeros(visible.shape).masked_fill(~visible, -1e9)

        for visible in (torch.ones(2, 1, 9, 9, dtype=torch.bool), keep[:, None, None, :].expand(-1, 1, 9, 9)):
            given = self.call(with_window, mask(visible), name="mine", module=module, scaling=0.4)
            oracle.assert_statistics(
                self.statistics(given), dense_attention(given.query, given.key, causal, scaling=0.4)
            )

    def test_unknown_names_without_a_function(self):
        with pytest.raises(UnsupportedCallError, match="'other' is not known"):
            self.statistics(self.call(None, name="other"))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_queries_that_follow_a_cache(implementation, cache):
    model = models.llama(attn_implementation=implementation).eval()
    mask = oracle.padding("left")
    ids = batch()
    past = (
        transformers.DynamicCache(config=model.config)
        if cache == "dynamic"
        else transformers.StaticCache(config=model.config, max_cache_len=20)
    )
    whole = oracle.eager_maps(model, input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        first, problems = oracle.measure(
            model, input_ids=ids[:, :8], attention_mask=mask[:, :8], past_key_values=past
        )
        assert problems == {}
        rest, problems = oracle.measure(
            model, input_ids=ids[:, 8:], attention_mask=mask, past_key_values=past
        )
    assert problems == {}
    for name, p in whole.items():
        want = oracle.map_statistics(p[:, :, 8:], torch.ones(2, 4, dtype=torch.bool), offset=8)
        oracle.assert_statistics(rest[name], want)
        want = oracle.map_statistics(p[:, :, :8, :8], mask[:, :8].bool())
        oracle.assert_statistics(first[name], want)
