"""The solvable model of examples/paper/positional.py against dense autograd, and against its own record."""

import math
from pathlib import Path

import asymptotics
import positional
import pytest
import torch
from common import HERE, read


def draw(model: positional.Model, n: int, seed: int):
    """The task written out: tokens and targets as dense tensors in float64."""
    generator = torch.Generator().manual_seed(seed)
    star = torch.randn(model.d, generator=generator)
    x = model.sigma * torch.randn(n, 2, model.d, generator=generator)
    star, x = star.double(), x.double()
    scores = torch.einsum("nid,d,e,nje->nij", x, star, star, x) / model.d
    mixing = torch.tensor(model.mixing, dtype=torch.float64)
    target = ((1 - model.omega) * scores.softmax(-1) + model.omega * mixing) @ x
    encodings = torch.ones(2, model.d, dtype=torch.float64) / math.sqrt(model.d)
    encodings[1] *= -1
    return star, x, encodings, target


def dense_loss(model: positional.Model, weights, x, encodings, target):
    tokens = x + encodings
    projected = tokens @ weights / math.sqrt(model.d)
    attention = (projected[:, :, None] * projected[:, None, :]).softmax(-1)
    values = tokens if model.values_with_positions else x
    error = (attention @ values - target).square().sum()
    return error / (2 * model.d) + model.decay / 2 * weights.square().sum()


@pytest.mark.parametrize("values_with_positions", [True, False])
def test_loss_and_gradient_equal_dense_autograd(values_with_positions):
    mixing = ((0.3, 0.7), (0.8, 0.2))  # not symmetric, so that rows cannot be mistaken for one another
    model = positional.Model(d=24, mixing=mixing, values_with_positions=values_with_positions)
    sample = positional.Sample(model, 40, seed=2)
    star, x, encodings, target = draw(model, 40, seed=2)
    torch.testing.assert_close(sample.star.double(), star)
    columns = torch.stack(
        [star, torch.randn(24, dtype=torch.float64), torch.ones(24, dtype=torch.float64) / 5], 1
    )
    used = (torch.arange(40)[:, None] < torch.tensor([40, 25, 31])).float()
    loss = sample.loss(columns.float(), used)
    gradient = sample.gradient(columns.float(), used)
    for place, count in enumerate((40, 25, 31)):
        weights = columns[:, place].clone().requires_grad_()
        want = dense_loss(model, weights, x[:count], encodings, target[:count])
        (slope,) = torch.autograd.grad(want, weights)
        assert loss[place].item() == pytest.approx(want.item(), rel=1e-5)
        torch.testing.assert_close(gradient[:, place].double(), slope, rtol=1e-4, atol=1e-5)


def test_descent_equals_the_dense_one():
    model = positional.Model(d=16, steps=30)
    sample = positional.Sample(model, 32, seed=1)
    got = positional.descend(sample, [1.0, 2.0])
    star, x, encodings, target = draw(model, 32, seed=1)
    for place, count in enumerate((16, 32)):
        for start, weights in (("positional", torch.ones(16).double() / 4), ("semantic", star)):
            velocity = torch.zeros_like(weights)
            for _ in range(30):
                weights = weights.detach().requires_grad_()
                loss = dense_loss(model, weights, x[:count], encodings, target[:count])
                velocity = 0.9 * velocity + torch.autograd.grad(loss, weights)[0]
                weights = weights - 0.15 * velocity
            last = dense_loss(model, weights, x[:count], encodings, target[:count])
            run = got[start]
            assert run["loss"][place] == pytest.approx(last.item() / 16, rel=1e-4)
            assert run["theta"][place] == pytest.approx(abs((star @ weights).item()) / 16, abs=1e-4)
            assert run["m"][place] == pytest.approx(abs(weights.sum().item()) / 16, abs=1e-4)


def test_minima_are_positional_and_semantic():
    model = positional.Model(d=200, steps=600)
    run = positional.descend(positional.Sample(model, 400, seed=0), [2.0])
    assert run["semantic"]["theta"][0] > 0.4 > 0.15 > run["positional"]["theta"][0]
    assert run["positional"]["m"][0] > 0.2 > 0.05 > run["semantic"]["m"][0]


def test_crossing_is_the_last_one_upward():
    assert positional.crossing([1.0, 1.2, 1.4], [-1.0, -0.5, 0.5]) == pytest.approx(1.3)
    assert positional.crossing([1.0, 1.2, 1.4, 1.6], [-1.0, 0.5, -1.0, 3.0]) == pytest.approx(1.45)
    assert positional.crossing([1.0, 1.2], [-1.0, -0.5]) is None
    assert positional.crossing([1.0, 1.2], [1.0, 2.0]) is None


def test_energy_is_the_distance_of_attention_matrices():
    h, wish = torch.randn(2, 5, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64)
    centre = torch.randn(2, 5, dtype=torch.float64)
    got = asymptotics.energy(h, centre, 3.0, wish, 0.5)
    for point in range(5):
        matrix = torch.outer(h[:, point], h[:, point]).softmax(-1)
        first, second = wish[:, point]
        target = torch.stack([torch.stack([first, 1 - first]), torch.stack([1 - second, second])])
        want = (h - centre)[:, point].square().sum() / 3 + 0.25 * (matrix - target).square().sum()
        assert got[point].item() == pytest.approx(want.item())


def test_proximal_finds_the_lowest_point_of_a_grid():
    centre = 0.5 * torch.randn(2, 20, dtype=torch.float64)
    wish = 0.3 + 0.5 * torch.rand(2, 20, dtype=torch.float64)
    h = asymptotics.proximal(centre, 15.0, wish, 0.5, [torch.zeros_like(centre), centre])
    found = asymptotics.energy(h, centre, 15.0, wish, 0.5)
    axis = torch.linspace(-3, 3, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).T
    for point in range(20):
        column = slice(point, point + 1)
        lowest = asymptotics.energy(grid, centre[:, column], 15.0, wish[:, column], 0.5).min()
        # The quadratic form turns 0.02 of grid into 1e-4 at most; a wrong valley is further off.
        assert found[point].item() <= lowest.item() + 1e-9
        assert found[point].item() == pytest.approx(lowest.item(), abs=2e-4)


def test_fixed_points_are_those_of_the_authors():
    model = positional.Model()
    found = positional.law(model, 1.25, power=10, draw=0)
    # The released code's tables at α = 1.25 (losses, m), and its mean over descents at d = 1,000 (θ).
    for start, loss in (("positional", 2.7097e-3), ("semantic", 2.7203e-3)):
        assert found[start]["loss"] == pytest.approx(loss, rel=0.01)
    assert found["positional"]["m"] == pytest.approx(0.2533, abs=0.01)
    assert found["semantic"]["theta"] == pytest.approx(0.471, abs=0.015)
    assert found["positional"]["theta"] < 1e-6
    assert found["semantic"]["m"] < 1e-6


def test_shuffling_keeps_the_tokens_and_both_ends():
    batch = torch.arange(60).view(3, 20)
    mixed = positional.shuffled(batch, seed=0)
    assert not torch.equal(mixed, batch)
    assert torch.equal(mixed[:, [0, -1]], batch[:, [0, -1]])
    assert torch.equal(mixed.sort(1).values, batch)


def test_shares_of_a_network_follow_its_relative_bias():
    from transformers import AutoModel, T5Config

    config = T5Config(
        d_model=16,
        d_kv=8,
        num_heads=2,
        num_layers=1,
        d_ff=16,
        vocab_size=50,
        is_encoder_decoder=False,
        use_cache=False,
    )
    network = AutoModel.from_config(config).encoder
    tokens = torch.randint(0, 50, (2, 24))
    before = positional.shares(network, tokens)
    table = network.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    table.data = torch.randn_like(table) * 30
    after = positional.shares(network, tokens)
    assert before.shape == after.shape == (1, 2)
    assert before.max() < 0.9 < after.min()


@pytest.mark.slow
def test_quick_run_gives_the_committed_numbers(tmp_path: Path):
    positional.main(["--quick", "--jobs", "2", "--out", str(tmp_path)])
    got, want = read("positional", tmp_path), read("positional", HERE / "quick")
    for case in ("text", "shuffled", "random"):
        assert got["heads"]["mean"][case][0] == pytest.approx(want["heads"]["mean"][case][0], abs=1e-3)
    ours, theirs = (found["transition"]["variants"][0] for found in (got, want))
    assert ours["crossing_of_mean"] == pytest.approx(theirs["crossing_of_mean"], abs=0.02)
    for start in ("positional", "semantic"):
        for what, close in (("loss", 2e-5), ("theta", 0.02), ("m", 0.02)):
            for one, other in zip(ours[start][what], theirs[start][what], strict=True):
                assert one[0] == pytest.approx(other[0], abs=close)
    assert len(list(tmp_path.glob("*.png"))) == 2
