"""What examples/paper/failures.py brings about and how it tells failures."""

import math
from pathlib import Path

import failures
import pytest
import torch
from common import HERE, read
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_qk import head_projections


class Job(nn.Module):
    """Stands for the module that the callback is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                "granite",
                vocab_size=32,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                intermediate_size=16,
                max_position_embeddings=16,
            )
        ).eval()


class Trainer:
    global_step = 4


def test_weak_skip_connections_and_large_weights():
    job, plain = Job(), Job()
    ids = torch.randint(0, 32, (2, 8))
    before = {name: (own.query.clone(), own.key.clone()) for name, own in head_projections(job).items()}
    watch = failures._make_watch(5, 3.0, 0.25)
    watch.on_train_start(Trainer(), job)
    for name, own in head_projections(job).items():
        torch.testing.assert_close(own.query, 3 * before[name][0])
        torch.testing.assert_close(own.key, 3 * before[name][1])
        head_projections(plain)[name].query.data.mul_(3)
        head_projections(plain)[name].key.data.mul_(3)
    with torch.no_grad():
        layer = plain.network.get_decoder().layers[0]
        seen = {}
        layer.register_forward_hook(lambda _, given, output: seen.update(x=given[0], out=output))
        plain.network(ids)
        watch.on_train_batch_start(Trainer(), job, None, 4)
        weak = {}
        job.network.get_decoder().norm.register_forward_pre_hook(lambda _, given: weak.update(x=given[0]))
        job.network(ids)
    torch.testing.assert_close(weak["x"], seen["out"] - 0.75 * seen["x"])
    watch.on_train_batch_end(Trainer(), job, {"loss": torch.tensor(2.0)}, None, 4)
    cosine = nn.functional.cosine_similarity(weak["x"][:, :, None], weak["x"][:, None], dim=-1)
    apart = cosine[:, ~torch.eye(8, dtype=torch.bool)].mean()
    assert watch.similarities == [[pytest.approx(float(apart), abs=1e-5)]]
    assert watch.losses == [2.0]


def test_unigram_loss_is_the_cross_entropy_of_frequencies():
    labels = [torch.tensor([[0, 1, 2], [3, 3, -100]]), torch.tensor([[1, 0, 0]])]
    found = failures.unigram_loss(torch.tensor([5, 2, 0]), 4, [{"labels": one} for one in labels])
    p = torch.tensor([6.0, 3.0, 1.0, 1.0]) / 11
    assert found == pytest.approx(-(p[1] * p[2] * p[3] * p[0] * p[0]).log().item() / 5)
    first = failures.unigram_loss(torch.tensor([5, 2, 0]), 4, [{"labels": one} for one in labels], limit=1)
    assert first == pytest.approx(-(p[1] * p[2] * p[3]).log().item() / 3)


def run(**changed):
    fields = {
        "seed": 0,
        "steps": [40, 50, 60, 70],
        "loss": [7.0, 5.0, 5.0, 4.0],
        "similarity": [[0.2, 0.99], [0.1, 0.96], [0.99, 0.9], [0.1, 0.97]],
        "entropy": [[0.5, 0.9], [0.05, 0.9], [0.5, 0.09], [0.02, 0.3]],
        "test_loss": 4.0,
        "choice_loss": 4.1,
    }
    return fields | changed


def test_a_run_fails_where_it_is_collapsed_and_behind():
    healthy = [7.0, 4.5, 4.5, 4.5]
    states = failures.failing(run(), healthy)
    assert states == {"rank": [False, True, False, False], "entropy": [False, True, True, False]}
    lost = failures.failing(run(loss=[7.0, 4.51, math.nan, math.nan]), healthy)
    assert lost == {"rank": [False, False, False, True], "entropy": [False, False, True, True]}
    early = failures.failing(run(steps=[20, 30, 40, 50]), healthy)
    assert early == {"rank": [False] * 4, "entropy": [False, False, True, False]}
    told = failures.told(run(), healthy)
    assert told["rank"] == {
        "first_failure": 50,
        "last_failure": 50,
        "share_of_steps": 0.25,
        "at_end": False,
    }
    assert told["entropy"] == {
        "first_failure": 50,
        "last_failure": 60,
        "share_of_steps": 0.5,
        "at_end": False,
    }
    assert told["lowest_entropy"] == 0.02
    assert failures.told(run(loss=healthy), healthy)["rank"]["first_failure"] is None


def test_the_weight_of_the_lowest_loss_is_chosen():
    sweep = [
        {"mode": mode, "form": form, "weight": weight, "choice_loss": loss}
        for mode in ("rank_mild", "entropy")
        for form in failures.FORMS
        for weight, loss in ((0.1, math.nan), (0.2, 5.0), (0.3, 4.0 if form == "target" else 6.0))
    ]
    best = failures.chosen(sweep)
    assert best["rank", "target"] == best["rank_mild", "target"] == best["entropy", "target"] == 0.3
    assert best["rank", "variance"] == best["entropy", "variance"] == 0.2


@pytest.mark.slow
def test_quick_run_gives_the_committed_numbers(tmp_path: Path):
    failures.main(["--quick", "--jobs", "2", "--out", str(tmp_path)])
    got, want = read("failures", tmp_path), read("failures", HERE / "quick")
    assert got["setting"]["unigram_loss"] == pytest.approx(want["setting"]["unigram_loss"], abs=1e-4)
    for mode, forms in want["modes"].items():
        for form, own in forms.items():
            found = got["modes"][mode][form]
            # Training adds up differences of arithmetic, at a large learning rate above all.
            assert found["test_loss"]["mean"] == pytest.approx(own["test_loss"]["mean"], abs=0.05)
            for name in ("lowest_entropy", "similarity"):
                assert found["curves"][name][-1] == pytest.approx(own["curves"][name][-1], abs=0.15)
    entropy = got["modes"]["entropy"]
    assert entropy["variance"]["curves"]["variance"][-1] < entropy["none"]["curves"]["variance"][-1] / 3
    drawn = {"failures_plane.png", "failures_curves.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == drawn
