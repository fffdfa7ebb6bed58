"""Moments of queries and keys against dense float64, and what they predict."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

import lightning_qk
from lightning_qk import TokenMoments, head_projections, predict_attention, token_moments
from lightning_qk.functional import Rotary, attention_statistics, qk_eigenvalues, qk_moments
from lightning_qk.functional.token_moments import rotate_tokens, token_classes
from lightning_qk.heads import find_attention
from lightning_qk.tokens import TokenMomentsWarning, predict_logit_std
from tests import models

HEADS, GROUPS, D_HEAD, WIDTH = 4, 2, 6, 10


def drawn(batch=3, n=50, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(batch, n, WIDTH, dtype=torch.float64) @ torch.randn(WIDTH, WIDTH).double() + 5
    x[:, 0] += 100
    return x


def weights(seed=1):
    torch.manual_seed(seed)
    return (
        torch.randn(HEADS, D_HEAD, WIDTH, dtype=torch.float64),
        torch.randn(GROUPS, D_HEAD, WIDTH, dtype=torch.float64),
    )


def projected(x, query, key):
    return torch.einsum("btd,hed->bhte", x, query), torch.einsum("btd,hed->bhte", x, key)


def sigma_of(x):
    flat = x.flatten(0, 1)
    centred = flat - flat.mean(0)
    return centred.T @ centred / len(flat)


@pytest.mark.parametrize("offset", [None, -3, torch.tensor([-2, 0, 5])])
def test_spectrum_is_that_of_the_dense_covariance(offset):
    x, (query, key) = drawn(), weights()
    rotary = Rotary(torch.tensor([1.0, 0.1]), start=2)
    given = {} if offset is None else {"offset": offset, "rotary": rotary}
    moments = TokenMoments.of(*projected(x, query, key))
    want = qk_moments(query, key, sigma_of(x[:, 1:]), support="head", **given)
    for name, value in moments.spectrum(**given).items():
        torch.testing.assert_close(value, want[name], rtol=1e-6, atol=1e-9)
    eigenvalues = qk_eigenvalues(query, key, sigma=sigma_of(x[:, 1:]), **given)
    torch.testing.assert_close(moments.eigenvalues(**given).abs(), eigenvalues.abs(), rtol=1e-6, atol=1e-9)
    scaled = moments.spectrum(0.5, n=WIDTH, **given)
    assert torch.allclose(scaled["frobenius_sq"], want["frobenius_sq"] / 4)
    assert torch.allclose(scaled["eig_mean"], want["trace"] / 2 / WIDTH)


def test_float32_keeps_four_digits_beside_a_massive_mean():
    x, (query, key) = drawn(), weights()
    x = x + 300
    moments = TokenMoments.of(*(part.float() for part in projected(x, query, key)))
    want = qk_moments(query, key, sigma_of(x[:, 1:]), support="head")
    for name, value in moments.spectrum().items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-4 * float(want[name].abs().max()))


def test_merging_is_the_same_as_one_call_in_any_order():
    x, (query, key) = drawn(batch=6), weights()
    mask = torch.rand(6, 50) > 0.2
    q, k = projected(x, query, key)
    whole = TokenMoments.of(q, k, query_mask=mask)
    parts = [TokenMoments.of(q[i : i + 2], k[i : i + 2], query_mask=mask[i : i + 2]) for i in (0, 2, 4)]
    for order in ((0, 1, 2), (2, 0, 1)):
        a, b, c = (parts[i] for i in order)
        for pooled in (a + b + c, a + (b + c)):
            for name, value in whole.spectrum().items():
                torch.testing.assert_close(pooled.spectrum()[name], value)
            torch.testing.assert_close(pooled.query.first_mean, whole.query.first_mean)
            torch.testing.assert_close(pooled.key.slot_sum, whole.key.slot_sum)
    with pytest.raises(ValueError, match="moments of one layer"):
        whole + TokenMoments.of(q[:, :2], k)


def test_padding_does_not_count_and_the_first_token_is_the_first_visible_one():
    x, (query, key) = drawn(n=20), weights()
    q, k = projected(x, query, key)
    mask = torch.ones(3, 25, dtype=torch.bool)
    mask[:, :5] = False
    padded = [torch.cat([torch.full_like(part[:, :, :5], torch.nan), part], 2) for part in (q, k)]
    moments, want = TokenMoments.of(*padded, query_mask=mask), TokenMoments.of(q, k)
    slots = want.key.slot_sum.shape[1]
    torch.testing.assert_close(moments.key.slot_sum[:, :slots], want.key.slot_sum)
    assert not moments.key.slot_count[:, slots:].any()
    torch.testing.assert_close(moments.cross_scatter, want.cross_scatter)
    torch.testing.assert_close(moments.key.first_mean, k[:, :, 0].mean(0))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_undone(interleaved):
    rotary = Rotary(torch.tensor([1.0, 0.3]), interleaved=interleaved, start=1, scale=1.5)
    vectors, position = torch.randn(2, 3, 7, 6), torch.randint(0, 50, (2, 7))
    turned = rotate_tokens(vectors, rotary, position)
    torch.testing.assert_close(rotate_tokens(turned, rotary, position, undo=True), vectors)
    from lightning_qk.functional.rotary import rotate

    want = rotate(vectors[1, :, 4, :, None], rotary, position[1, 4])[..., 0]
    torch.testing.assert_close(turned[1, :, 4], want)


@pytest.mark.parametrize("rotary", [None, Rotary(torch.tensor([1.0, 0.2, 0.01]))])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gaussian_tokens_are_predicted(rotary, is_causal):
    x = drawn(batch=64, n=40)
    query, key = (0.05 * part for part in weights())
    q, k = projected(x, query, key)
    moments = TokenMoments.of(q, k)
    head = lightning_qk.HeadProjections(query, key, None, None, 0.4, "toy", rotary=rotary)
    place = torch.arange(40)[None]
    if rotary is not None:
        q, k = (rotate_tokens(part, rotary, place) for part in (q, k))
    measured = attention_statistics(q, k, is_causal=is_causal, scaling=0.4)
    predicted = predict_attention(head, moments, length=40, is_causal=is_causal, sequences=64)
    assert {*predicted} == {*measured}
    for name in ("entropy_normalized", "sink_first", "linear_share", "max_prob"):
        torch.testing.assert_close(predicted[name].double(), measured[name].double(), rtol=0.1, atol=0.03)
    torch.testing.assert_close(
        predicted["logit_std"].double(), measured["logit_std"].double(), rtol=0.05, atol=0.0
    )
    closed = predict_logit_std(head, moments, length=40, is_causal=is_causal)
    torch.testing.assert_close(closed, measured["logit_std"].double(), rtol=0.1, atol=0.0)
    again = predict_attention(head, moments, length=40, is_causal=is_causal, sequences=64)
    assert all(torch.equal(again[name], value) for name, value in predicted.items())


def inputs_of(model, batch):
    """What enters each attention layer, by a hook of the test's own."""
    found, handles = {}, []
    for name, module in find_attention(model).items():

        def hook(_, args, kwargs, name=name):
            found[name] = args[0] if args else kwargs["hidden_states"]

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model.eval()(**batch)
    for handle in handles:
        handle.remove()
    return found


def deepseek(**kwargs):
    config = transformers.DeepseekV3Config(
        vocab_size=models.VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=8, intermediate_size=32, first_k_dense_replace=1, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=1, moe_intermediate_size=16, n_shared_experts=1, pad_token_id=0,
    )  # fmt: skip
    return models.build(transformers.DeepseekV3ForCausalLM, config, **kwargs)


def qwen3(**kwargs):
    config = transformers.Qwen3Config(**{**models._GROUPED, "head_dim": 8})
    return models.build(transformers.Qwen3ForCausalLM, config, **kwargs)


def bloom(**kwargs):
    config = transformers.BloomConfig(vocab_size=models.VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    return models.build(transformers.BloomForCausalLM, config, **kwargs)


def tokens(batch=4, n=24):
    torch.manual_seed(0)
    return {"input_ids": torch.randint(3, models.VOCABULARY, (batch, n))}


@pytest.mark.parametrize(
    "kind", [models.gpt2, models.bert, models.llama, models.mistral, models.gemma2, bloom]
)
def test_moments_of_a_model_are_those_of_its_hidden_states(kind):
    model, batch = kind().double(), tokens()
    entered = inputs_of(model, batch)
    found = token_moments(model, [{"input_ids": part} for part in batch["input_ids"].split(3)])
    heads = head_projections(model)
    assert [*found] == [*heads]
    for name, moments in found.items():
        want = qk_moments(heads[name].query, heads[name].key, sigma_of(entered[name][:, 1:]), support="head")
        for statistic, value in moments.spectrum().items():
            torch.testing.assert_close(value, want[statistic].detach(), rtol=1e-4, atol=1e-6)


def test_windows_caps_and_sinks_are_those_of_the_calls():
    batch = tokens()
    assert [one.sliding_window for one in token_moments(models.mistral(), [batch]).values()] == [5, 5]
    assert all(one.softcap == 2.0 for one in token_moments(models.gemma2(), [batch]).values())
    found = token_moments(models.gpt_oss(), [batch])
    assert all(one.sinks.shape == (4,) for one in found.values())
    for kind in (models.mistral, models.gemma2, models.gpt_oss):
        model = kind()
        heads = head_projections(model)
        for name, one in token_moments(model, [batch]).items():
            predicted = predict_attention(heads[name], one, length=24, is_causal=True)
            assert all(value.isfinite().all() for key, value in predicted.items() if key != "sink_learnt")


def test_norms_of_queries_and_keys_come_before_the_moments():
    model, batch = qwen3().double(), tokens()
    (name, layer), *_ = find_attention(model).items()
    entered = inputs_of(model, batch)[name]
    with torch.no_grad():
        q = layer.q_norm(layer.q_proj(entered).unflatten(-1, (4, 8))).transpose(1, 2)
        k = layer.k_norm(layer.k_proj(entered).unflatten(-1, (2, 8))).transpose(1, 2)
    want = TokenMoments.of(q, k)
    found = token_moments(model, [batch])[name]
    torch.testing.assert_close(found.cross_scatter, want.cross_scatter, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.key.first_mean, want.key.first_mean, rtol=1e-4, atol=1e-6)


def test_latent_attention_is_right_though_its_rotation_reorders_coordinates():
    model, batch = deepseek().double(), tokens()
    (name, heads), *_ = head_projections(model).items()
    found = token_moments(model, [batch])[name]
    # Coordinates that the rotation reaches bypass the latent's norm: queries have no norm at all.
    entered = inputs_of(model, batch)[name]
    q = torch.einsum("btd,hed->bhte", entered, heads.query.detach())
    torch.testing.assert_close(
        found.query.covariance, TokenMoments.of(q, q).query.covariance, rtol=1e-4, atol=1e-6
    )
    k = torch.einsum("btd,hed->bhte", entered, heads.key.detach())
    part = slice(heads.rotary.start, None)
    torch.testing.assert_close(
        found.key.covariance[:, part, part],
        TokenMoments.of(k, k).key.covariance[:, part, part], rtol=1e-4, atol=1e-6,
    )  # fmt: skip


def gemma3n(**kwargs):
    config = transformers.Gemma3nTextConfig(
        **{**models._GROUPED, "head_dim": 8, "num_hidden_layers": 4, "intermediate_size": [48] * 4},
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=5,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=models.VOCABULARY,
        activation_sparsity_pattern=[0.0] * 4, laurel_rank=4,
    )  # fmt: skip
    return models.build(transformers.Gemma3nForCausalLM, config, **kwargs)


def test_shared_keys_are_those_of_the_layer_that_lends_them():
    model, batch = gemma3n().double(), tokens()
    entered = inputs_of(model, batch)
    found = token_moments(model, [batch])
    layers = list(find_attention(model).items())
    # The last layers take the keys of the last one of their kind that has its own.
    for borrower, lender in ((2, 0), (3, 1)):
        (name, layer), (source, other) = layers[borrower], layers[lender]
        assert head_projections(model)[name].key_layer == source
        with torch.no_grad():
            q = layer.q_norm(layer.q_proj(entered[name]).unflatten(-1, (4, 8))).transpose(1, 2)
            k = other.k_norm(other.k_proj(entered[source]).unflatten(-1, (2, 8))).transpose(1, 2)
        want, got = TokenMoments.of(q, k), found[name]
        for one, two in ((got.cross_scatter, want.cross_scatter), (got.key.scatter, want.key.scatter)):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shift", [None, 7])
def test_positions_of_the_batch_are_heeded(shift):
    model, batch = models.llama().double(), tokens()
    want = token_moments(model, [batch])
    if shift is not None:
        found = token_moments(model, [{**batch, "position_ids": torch.arange(24)[None] + shift}])
        for name in want:
            torch.testing.assert_close(
                found[name].cross_scatter, want[name].cross_scatter, rtol=1e-4, atol=1e-4
            )


def test_alibi_is_a_bias_by_offset():
    model, batch = bloom(), tokens()
    (name, moments), *_ = token_moments(model, [batch]).items()
    assert moments.unexplained is None
    steps = moments.offset_bias[:, :24].diff(dim=1)
    torch.testing.assert_close(
        steps[:, -1].float(), torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]), rtol=1e-2, atol=1e-3
    )
    predicted = predict_attention(head_projections(model)[name], moments, length=24, is_causal=True)
    assert predicted["entropy"].isfinite().all()
    with pytest.raises(ValueError, match="length of 24 at most"):
        predict_attention(head_projections(model)[name], moments, length=25, is_causal=True)


def test_encoder_and_decoder():
    model = models.t5().double()
    batch = {"input_ids": tokens()["input_ids"], "decoder_input_ids": tokens(n=10)["input_ids"]}
    heads = head_projections(model)
    entered = inputs_of(model, batch)
    with torch.no_grad():
        memory = model.get_encoder()(batch["input_ids"]).last_hidden_state
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", TokenMomentsWarning)
        found = token_moments(model, [batch])
    assert {*heads} == {*found} | {name for name in heads if any(name in str(one.message) for one in said)}
    cross = [name for name in found if not heads[name].self_attention]
    assert cross
    for name in cross:
        assert found[name].cross_scatter is None
        q, k = (
            torch.einsum("btd,hed->bhte", x, own.detach())
            for x, own in ((entered[name], heads[name].query), (memory, heads[name].key))
        )
        want = TokenMoments.of(q, k, self_attention=False)
        for side in ("query", "key"):
            one, two = getattr(found[name], side), getattr(want, side)
            torch.testing.assert_close(one.covariance, two.covariance, rtol=1e-4, atol=1e-8)
            torch.testing.assert_close(one.mean, two.mean, rtol=1e-4, atol=1e-8)
        with pytest.raises(ValueError, match="cross-attention"):
            found[name].spectrum()
        if found[name].unexplained is None:
            predicted = predict_attention(heads[name], found[name], length=10, is_causal=False)
            assert predicted["entropy"].isfinite().all()
    assert found


def test_a_model_is_left_as_it_was_and_errors_say_how_to_mend():
    model = models.llama().train()
    batch = tokens()
    state, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    token_moments(model, [batch])
    assert model.training
    assert torch.equal(seed, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="at least one batch"):
        token_moments(model, [])
    with pytest.raises(ValueError, match="found none in Linear"):
        token_moments(nn.Linear(2, 2), [torch.zeros(1, 2)])
    moments = next(iter(token_moments(model, [tokens()]).values()))
    other = next(iter(head_projections(models.gpt2()).values()))
    with pytest.raises(ValueError, match="same layer"):
        predict_attention(other, moments, length=5, is_causal=True)


def test_tokens_like_the_first_are_a_class_of_their_own():
    torch.manual_seed(0)
    q, k = torch.randn(8, 2, 40, 6).double(), torch.randn(8, 2, 40, 6).double()
    k[:, :, 0] += 30
    k[3, :, 17] += 30
    k[:4, :, 2] += 20
    whole = TokenMoments.of(q, k)
    assert whole.query.slot_count.sum(1).tolist() == whole.key.slot_count.sum(1).tolist() == [8 * 39 - 5, 5]
    pooled = TokenMoments.of(q[:4], k[:4]) + TokenMoments.of(q[4:], k[4:])
    for moments in (whole, pooled):
        share, means, covariance = token_classes(moments, 40)
        assert share[[0, 1, 2]].tolist() == [0, 0, 0.5]
        assert share.count_nonzero() < 10  # of 17's slot, besides
        torch.testing.assert_close(
            means[1, :, 2, 6:], torch.full((2, 6), 20.0).double(), rtol=0.0, atol=2.5
        )  # shrunk
        torch.testing.assert_close(covariance, torch.eye(12).double().expand(2, -1, -1), rtol=0.0, atol=0.5)


def test_a_second_sink_is_predicted_whatever_the_seed():
    torch.manual_seed(0)
    q, k = torch.randn(64, 2, 40, 6) / 2, torch.randn(64, 2, 40, 6) / 2
    k[:, :, 0, 0] += 20
    k[::4, :, 1, 0] += 20
    q[..., 0] += 2
    head = lightning_qk.HeadProjections(q[0, :, :6], k[0, :, :6], None, None, 0.2, "toy")
    measured = attention_statistics(q, k, is_causal=True, scaling=0.2)
    for seed in range(3):
        predicted = predict_attention(
            head, TokenMoments.of(q, k), length=40, is_causal=True, sequences=8, seed=seed
        )
        for name in ("sink_first", "distance", "entropy_normalized"):
            torch.testing.assert_close(predicted[name], measured[name], rtol=0.07, atol=0.0)


def test_means_by_position_are_kept():
    torch.manual_seed(0)
    place = torch.arange(60.0)
    step = 5 * torch.stack([(place / scale).cos() for scale in (9, 11, 14, 20, 27, 50)], -1)
    q, k = (torch.randn(64, 2, 60, 6).double() + step for _ in range(2))
    share, means, covariance = token_classes(TokenMoments.of(q, k), 60)
    assert not share.any()
    torch.testing.assert_close(means[0, ..., 6:], step.double().expand(2, -1, -1), rtol=0.0, atol=2.0)
    assert float((means[0, ..., 6:] - step).square().mean()) < 0.5
    # What means of slots do not hold is in the covariance.
    assert 0.9 < float(covariance.diagonal(dim1=-2, dim2=-1).mean()) < 1.5
