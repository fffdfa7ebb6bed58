"""What examples/paper/heads.py predicts and observes, against simulation and the definitions."""

from pathlib import Path

import heads
import pytest
import torch
from common import HERE, read
from observe import LAGS, linear_by_theta, observe
from predict import independent, midpoints, scaled_moments, walk, walk_probability
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lightning_qk import head_projections
from lightning_qk.functional import attention_statistics, signal_propagation_probability


def small(kind: str, **fields):
    """A network whose heads, biases and norms are far from where they start."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM if kind != "bert" else AutoModel
    network = model.from_config(AutoConfig.for_model(kind, vocab_size=64, **fields))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name.lower() or "ln_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.25 * torch.randn_like(parameter))
    return network.eval()


def llama():
    return small(
        "llama",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
    )


def gpt2():
    return small("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=32)


def window(logits, n):
    part = (1 + logits - logits.mean(-1, keepdim=True)) / n
    return (part > 0) & (part < 1)


@pytest.mark.parametrize("place", [0.3, 1.0])
@pytest.mark.parametrize("length", [48, 256])
def test_walk_probability_is_that_of_simulated_walks(place, length):
    generator = torch.Generator().manual_seed(1)
    d, draws = 48, 4000
    form = (torch.randn(d, d, generator=generator, dtype=torch.float64) + 2 * torch.eye(d)) / d
    factor = torch.eye(d) + 0.3 * torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    inner = factor.T @ form @ factor
    at = max(round(place * length) - 1, 0)
    found = torch.zeros(length, dtype=torch.float64)
    for _ in range(8):
        steps = torch.randn(draws // 8, length, d, generator=generator, dtype=torch.float64) @ factor.T
        walks = steps.cumsum(1)
        logits = torch.einsum("bd,btd->bt", walks[:, at] @ form, walks)
        found += window(logits, length).double().mean(0) / 8
    theta = (torch.arange(length, dtype=torch.float64) + 1) / length
    moments = inner.trace(), (inner @ inner).trace(), inner.square().sum()
    predicted = walk_probability(theta, *moments, place=place, keys=length)
    assert (found - predicted)[length // 8 :].abs().max() < 0.06
    assert (found - predicted).abs().mean() < 0.03


def test_walk_probability_of_the_last_query_is_the_packages():
    theta = midpoints(16)
    moments = torch.tensor([1.5, 0.7, 0.9], dtype=torch.float64)
    expected = signal_propagation_probability(theta, *moments)
    torch.testing.assert_close(walk_probability(theta, *moments), expected)
    symmetric = walk_probability(theta, *moments, symmetric=True)
    torch.testing.assert_close(symmetric, signal_propagation_probability(theta, *moments[[0, 1, 1]]))
    assert walk_probability(theta, moments[0], torch.tensor(-1.0), moments[2], symmetric=True).isnan().any()
    # Without spectrum the limit is ½ and any number of tokens has all of them in the window.
    nothing = 1e-9 * torch.ones(3, dtype=torch.float64)
    assert (walk_probability(theta, *nothing, keys=64) > 0.999).all()
    assert (signal_propagation_probability(theta, *nothing) - 0.5).abs().max() < 1e-3


def test_a_matched_walk_has_the_tokens_variance():
    moments = {"trace": torch.ones(1), "trace_sq": torch.ones(1), "frobenius_sq": 2 * torch.ones(1)}
    moments = {name: value.double() for name, value in moments.items()}
    theta = midpoints(4)[:, None]
    half = [moments["trace"] / 50, moments["trace_sq"] / 2500, moments["frobenius_sq"] / 2500]
    found = walk(moments, 4, is_causal=True, keys=100, matched=True)
    torch.testing.assert_close(found, walk_probability(theta, *half, keys=100))


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("strength", [0.3, 3.0])
def test_independent_tokens_are_predicted(make, strength):
    network = make()
    layer = next(iter(head_projections(network).values()))
    generator = torch.Generator().manual_seed(2)
    d, n = 32, 64
    factor = strength * torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    mean = strength * torch.randn(d, generator=generator, dtype=torch.float64)
    tokens = mean + torch.randn(400, n, d, generator=generator, dtype=torch.float64) @ factor.T
    query, key = tokens @ layer.query.double().flatten(0, 1).T, tokens @ layer.key.double().flatten(0, 1).T
    if layer.query_bias is not None:
        query, key = query + layer.query_bias.flatten(), key + layer.key_bias.flatten()
    query, key = (x.unflatten(-1, (-1, layer.d_head)).movedim(2, 1).detach() for x in (query, key))
    if layer.rotary is not None:
        pairs = layer.rotary.inv_freq.numel()
        turn = torch.polar(
            torch.ones(n, pairs, dtype=torch.float64),
            torch.outer(torch.arange(n), layer.rotary.inv_freq).double(),
        )
        query, key = (torch.complex(x[..., :pairs], x[..., pairs:]) * turn for x in (query, key))
        query, key = (torch.cat([x.real, x.imag], -1) for x in (query, key))
    key = key.repeat_interleave(layer.heads // layer.kv_heads, 1)
    last = layer.scaling * torch.einsum("bhd,bhtd->bht", query[:, :, -1], key)
    measured = window(last[..., :-1], n).double().mean((0, 2))
    predicted = independent(layer, mean, factor @ factor.T, keys=n, is_causal=True)
    assert measured.min() < 0.999
    assert (measured - predicted).abs().max() < 0.03


def test_moments_are_those_of_the_dense_form_and_do_not_depend_on_folding():
    network = gpt2()
    plain, folded = head_projections(network), head_projections(network, fold_norm=True)
    name = next(iter(plain))
    norm = network.transformer.h[0].ln_1
    x = torch.randn(500, 32, dtype=torch.float64)
    whitened = nn.functional.layer_norm(x, (32,))
    entering = whitened * norm.weight.double() + norm.bias.double()
    before, after = (torch.cov(part.T, correction=0).detach() for part in (whitened, entering))
    one, other = scaled_moments(plain[name], after), scaled_moments(folded[name], before)
    for key in ("trace", "trace_sq", "frobenius_sq", "sym_var"):
        torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-7)
    values, vectors = torch.linalg.eigh(after)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    layer = plain[name]
    for head in range(4):
        dense = layer.scaling * root @ layer.query[head].double().T @ layer.key[head].double() @ root
        assert one["trace"][head].item() == pytest.approx(dense.trace().item(), abs=1e-8)
        assert one["trace_sq"][head].item() == pytest.approx((dense @ dense).trace().item(), abs=1e-8)
        assert one["frobenius_sq"][head].item() == pytest.approx(dense.square().sum().item(), rel=1e-8)


@pytest.mark.parametrize("is_causal", [True, False])
def test_linear_pairs_are_counted_by_position(is_causal):
    torch.manual_seed(0)
    query, key = 3 * torch.randn(2, 4, 24, 8), torch.randn(2, 2, 24, 8)
    linear, total = linear_by_theta(query, key, scaling=0.4, is_causal=is_causal, bins=3, min_keys=5)
    expected, number = torch.zeros(3, 4), torch.zeros(3, 4)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(4) for i in range(24)):
        n = i + 1 if is_causal else 24
        if n < 5:
            continue
        logits = 0.4 * key[b, h // 2, :n] @ query[b, h, i]
        for j, inside in enumerate(window(logits, n).tolist()):
            place = int((j + 0.5) / n * 3)
            expected[place, h] += inside
            number[place, h] += 1
    assert torch.equal(linear.float(), expected)
    assert torch.equal(total.float(), number)
    if not is_causal:
        statistics = attention_statistics(query, key, scaling=0.4)
        torch.testing.assert_close((linear.sum(0) / total.sum(0)).float(), statistics["linear_share"])


def test_a_network_is_observed_as_it_runs():
    network = gpt2()
    ids = torch.randint(0, 64, (4, 32))
    observed = observe(network, [{"input_ids": part} for part in ids.split(2)], bins=4)
    assert observed.is_causal
    network.set_attn_implementation("eager")
    with torch.no_grad():
        output = network(ids, output_attentions=True, output_hidden_states=True)
    for index, (name, statistics) in enumerate(observed.statistics.items()):
        p = output.attentions[index].double()
        entropy = -(p * p.clamp_min(1e-300).log()).sum(-1).mean((0, 2))
        torch.testing.assert_close(statistics["entropy"].double(), entropy, rtol=1e-4, atol=1e-4)
        x = network.transformer.h[index].ln_1(output.hidden_states[index]).detach().double()
        tokens = observed.tokens[name]
        torch.testing.assert_close(tokens.mean, x.mean((0, 1)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            tokens.covariance, torch.cov(x.flatten(0, 1).T, correction=0), rtol=1e-3, atol=1e-4
        )
        moved = [(x[:, lag:] - x[:, :-lag]).square().sum(-1).mean() for lag in LAGS if lag < 32]
        assert tokens.growth[: len(moved)] == pytest.approx(
            [float(one / moved[0]) for one in moved], rel=1e-4
        )


def test_growth_tells_a_walk_from_independent_tokens():
    from observe import _Sums

    torch.manual_seed(0)
    walk_sums, drawn = _Sums(), _Sums()
    walk_sums.add(torch.randn(200, 64, 8).cumsum(1))
    drawn.add(torch.randn(200, 64, 8))
    assert walk_sums.moments().growth == pytest.approx(list(LAGS), rel=0.1)
    assert drawn.moments().growth == pytest.approx([1.0] * len(LAGS), rel=0.03)


def test_correlations_have_intervals():
    from scipy import stats

    torch.manual_seed(0)
    x = torch.randn(40, dtype=torch.float64)
    y = x + torch.randn(40, dtype=torch.float64)
    value, low, high = heads.correlation(x, y, ranks=False)
    expected = stats.pearsonr(x.numpy(), y.numpy())
    assert value == pytest.approx(expected.statistic)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval(0.95)), abs=1e-6)
    value, low, high = heads.correlation(x, y.exp())
    assert value == pytest.approx(stats.spearmanr(x.numpy(), y.numpy()).statistic)
    assert low < value < high
    assert heads.correlation(x[:4], y[:4]) is None
    assert heads.correlation(torch.ones(9), y[:9]) is None


@pytest.mark.slow
def test_quick_run_gives_the_committed_numbers(tmp_path: Path):
    heads.main(["--quick", "--jobs", "2", "--out", str(tmp_path)])
    got, want = read("heads", tmp_path)["models"], read("heads", HERE / "quick")["models"]
    assert got.keys() == want.keys()
    for kind, model in want.items():
        # The encoder is the same everywhere; training adds up differences of arithmetic.
        room = 0.002 if kind == "encoder" else 0.03
        assert got[kind]["measured"]["mean"] == pytest.approx(model["measured"]["mean"], abs=room)
        for name, predictor in model["predictors"].items():
            found = got[kind]["predictors"][name]
            assert found["mean_abs_error"] == pytest.approx(predictor["mean_abs_error"], abs=room), name
            if kind == "encoder":
                assert found["spearman"][0] == pytest.approx(predictor["spearman"][0], abs=0.02), name
    drawn = {"propagation", "theta", "correlation", "rotary"}
    assert {path.name for path in tmp_path.glob("*.png")} == {f"heads_{name}.png" for name in drawn}
