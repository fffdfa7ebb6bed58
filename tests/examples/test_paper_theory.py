"""The laws of examples/paper/theory.py against simulation, known distributions and its own record."""

import json
from pathlib import Path

import pytest
import theory
import torch
from common import HERE, read
from walks import D_MODEL, KINDS, THETAS, count_hits, covariances, draw_head

from lightning_qk.functional import (
    exact_signal_propagation_probability,
    qk_moments,
    signal_propagation_probability,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d_head", [4, 16, 64])
def test_heads_have_the_moments_that_were_asked_for(kind, d_head):
    head = draw_head("grid", kind, d_head, 2.0, 0.5, seed=3)
    form = head.query.double().T @ head.key.double()
    assert torch.linalg.matrix_rank(form, rtol=1e-5) == d_head
    found = qk_moments(head.query[None], head.key[None])
    if kind == "independent":
        assert found["trace"].item() == pytest.approx(2, abs=2)
        return
    assert found["trace"].item() == pytest.approx(2, abs=1e-4)
    assert found["frobenius_sq"].item() == pytest.approx(4 / d_head + 0.5, rel=1e-4)
    part = {"symmetric": 0.0, "mixed": 0.25, "rotation": 0.5}[kind]
    assert found["asymmetry"].item() == pytest.approx(part / (4 / d_head + 0.5), abs=1e-4)
    assert form.trace().item() == pytest.approx(2, abs=1e-4)


def test_counts_equal_a_simulation_of_all_tokens():
    heads = [draw_head("grid", kind, 16, 1.0, 0.3, seed=1) for kind in KINDS]
    forms = torch.stack([head.form() for head in heads])
    got = count_hits(5, 100, forms, [32, 64])
    walk = torch.randn(100, 64, D_MODEL, generator=torch.Generator().manual_seed(5)).cumsum(1)
    for row, length in enumerate([32, 64]):
        tokens = walk[:, :length].double()
        for column, head in enumerate(heads):
            query, key = tokens[:, -1] @ head.query.double().T, tokens @ head.key.double().T
            logits = (key * query[:, None]).sum(-1)
            share = 1 / length + (logits - logits.mean(1, keepdim=True)) / length
            inside = ((share > 0) & (share < 1)).sum(0)
            places = [round(theta * length) - 1 for theta in THETAS]
            assert (inside[places] - got[row, :, column]).abs().max() <= 1  # a float32 tie


@pytest.mark.parametrize("kind", KINDS)
def test_exact_law_agrees_with_simulation_where_the_formula_does_not(kind):
    head = draw_head("grid", kind, 4, 4.0, 0.3, seed=2)
    draws = 20_000
    simulated = count_hits(1, draws, head.form()[None], [32])[0, :, 0] / draws
    theta = torch.tensor(THETAS, dtype=torch.float64)
    exact = exact_signal_propagation_probability(theta, head.query[None], head.key[None], length=32)[:, 0]
    assert (exact - simulated).abs().max() < 0.016  # 4.5 standard errors
    assert (signal_propagation_probability(theta, *head.moments()) - simulated).abs().max() > 0.05


def test_coloured_walks():
    sigma = covariances()["correlated"]
    head = draw_head("x", "mixed", 16, 1.0, 0.5, 0, sigma)
    root = torch.linalg.cholesky(sigma)
    steps = torch.randn(2, 3, D_MODEL)
    coloured = steps @ root.T
    want = torch.einsum("bi,rij,bj->b", coloured[:, 0], (head.query.T @ head.key)[None], coloured[:, 1])
    got = torch.einsum("bi,ij,bj->b", steps[:, 0], head.form(), steps[:, 1])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert head.moments()[0].item() == pytest.approx(head.form().trace().item(), rel=1e-3)


def test_phases_of_known_curves():
    theta = torch.tensor(THETAS)
    step = (theta > 0.5).float()
    rho = torch.stack([torch.full_like(theta, 0.5), step, 1 - step, 0.1 * step, torch.ones_like(theta)], 1)
    assert theory.classify(rho) == ["uniform", "localized", "localized", "saturated", "uniform"]


@pytest.mark.slow
def test_quick_run_gives_the_committed_numbers(tmp_path: Path):
    theory.main(["--quick", "--jobs", "2", "--out", str(tmp_path)])
    got, want = read("theory", tmp_path), read("theory", HERE / "quick")
    # The same seeds: differences come from another machine's arithmetic, a few walks on the edge of the window.
    for name in ("formula", "finite", "exact"):
        for statistic in ("max", "rms"):
            assert got["everywhere"][name][statistic] == pytest.approx(
                want["everywhere"][name][statistic], abs=2e-3
            )
            assert got["bar"][name][statistic] == pytest.approx(want["bar"][name][statistic], abs=2e-3)
    assert got["bar"]["holds_exact"]
    assert abs(got["phase"]["agree"] - want["phase"]["agree"]) <= 1
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "theory_propagation.png",
        "theory_break.png",
        "theory_phase.png",
    }
    assert json.loads((tmp_path / "theory.json").read_text())["made"]["quick"]
