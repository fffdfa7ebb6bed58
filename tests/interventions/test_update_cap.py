"""Capped updates against singular value decompositions."""

import copy

import models
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_qk import AttentionMonitor, LocAteR, QKClip, QKSpectrumMonitor, UpdateCap, cap_updates
from lightning_qk.heads.reader import ProjectionReader, head_projections
from lightning_qk.interventions.update_cap import UpdateCapper

MODELS = {"gpt2": models.gpt2, "bert": models.bert, "llama": models.llama}
BATCH = torch.randint(3, models.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


def sides(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    return {
        (name, side): getattr(head, side).detach().flatten(0, 1).clone()
        for name, head in head_projections(model).items()
        for side in ("query", "key")
    }


def top(matrix: Tensor) -> float:
    return torch.linalg.svdvals(matrix.double())[0].item()


@pytest.mark.parametrize("name", MODELS)
def test_updates_are_what_they_were_scaled_to_the_cap(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    free = copy.deepcopy(model)
    cap = 0.02
    optimizers = [torch.optim.AdamW(own.parameters(), lr=5e-3, weight_decay=0.1) for own in (model, free)]
    capper = UpdateCapper(model, cap)
    end = capper.follow(optimizers[0])
    capped = 0
    for _ in range(6):
        free.load_state_dict(model.state_dict())
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        before = sides(model)
        for own, optimizer in zip((model, free), optimizers, strict=True):
            torch.manual_seed(1)
            own.train()
            optimizer.zero_grad()
            own(input_ids=BATCH, labels=BATCH).loss.backward()
            optimizer.step()
        after, wanted = sides(model), sides(free)
        for key, weight in before.items():
            update = wanted[key] - weight
            ratio = top(update) / top(weight)
            found = capper.newest[key]
            assert found.ratio.item() == pytest.approx(ratio, rel=0.01)
            factor = min(1.0, cap / ratio)
            assert found.factor.item() == pytest.approx(factor, rel=0.01)
            assert top(after[key] - weight) <= 1.01 * cap * top(weight)
            torch.testing.assert_close(after[key], weight + found.factor * update, rtol=1e-5, atol=1e-6)
            if factor == 1.0:
                assert torch.equal(after[key], wanted[key])
            capped += factor < 1
        # Nothing else is touched.
        layers = set(ProjectionReader(model))
        for key, value in free.state_dict().items():
            if not any(key.startswith(layer) for layer in layers) or key.endswith("bias"):
                assert torch.equal(model.state_dict()[key], value)
    assert capped
    end()
    assert not optimizers[0]._optimizer_step_pre_hooks
    assert not optimizers[0]._optimizer_step_post_hooks


def test_values_in_a_fused_weight_are_left_alone():
    torch.manual_seed(0)
    model = models.gpt2()
    end = cap_updates(model, torch.optim.SGD(model.parameters(), lr=1.0), 1e-3)
    end()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    cap_updates(model, optimizer, 1e-3)
    weight = model.transformer.h[0].attn.c_attn.weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight[:, 64:], before[:, 64:] - weight.grad[:, 64:], rtol=0, atol=0)
    for start in (0, 32):
        update = (weight - before)[:, start : start + 32]
        assert top(update.detach()) == pytest.approx(1e-3 * top(before[:, start : start + 32]), rel=0.01)


def test_steps_that_are_nothing_or_not_finite_are_left_alone():
    model = models.gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    capper = UpdateCapper(model, 0.01)
    capper.follow(optimizer)
    weights = [layer.attn.c_attn.weight for layer in model.transformer.h]
    before = [weight.detach().clone() for weight in weights]
    weights[0].grad = torch.zeros_like(weights[0])
    weights[1].grad = torch.full_like(weights[1], torch.nan)
    optimizer.step()
    assert torch.equal(weights[0], before[0])
    assert weights[1].isnan().all()
    assert all(capped.factor == 1 for capped in capper.newest.values())


def test_the_callback_holds_every_step_and_goes_with_the_rest(tmp_path):
    torch.manual_seed(0)
    logger = CSVLogger(tmp_path)
    module = models.Job(lr=1e-2, optimizer="adamw")
    start = sides(module)
    callbacks = [
        QKClip(3.0),
        UpdateCap(0.005),
        LocAteR(0.1),
        QKSpectrumMonitor(report=False),
        AttentionMonitor(report=False),
    ]
    trainer = models.trainer(callbacks, max_steps=4, logger=logger, log_every_n_steps=2)
    trainer.fit(module, models.tokens())
    metrics = trainer.callback_metrics
    assert metrics["update_cap/factor/min"] < 1
    assert metrics["update_cap/ratio/max"] > 0.005
    assert metrics["update_cap/capped"] == 4
    header = next((tmp_path / "lightning_logs").rglob("metrics.csv")).read_text().splitlines()[0]
    assert "update_cap/layer_01/factor" in header
    assert "update_cap/layer_00/ratio" in header
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert start.keys() == sides(module).keys()


def test_without_clip_a_run_moves_no_further_than_its_steps_allow():
    torch.manual_seed(0)
    module = models.Job(lr=1e-2, optimizer="adamw")
    start = sides(module)
    models.trainer([UpdateCap(0.005)], max_steps=4, accumulate_grad_batches=2).fit(module, models.tokens())
    for key, weight in sides(module).items():
        assert top(weight - start[key]) <= 1.01 * ((1.005) ** 4 - 1) * top(start[key])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"cap": 0.0}, "cap above 0"), ({"cap": float("inf")}, "finite cap"), ({"iterations": 0}, "at least 1")],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        UpdateCap(**arguments)


def test_what_cannot_be_capped_is_refused():
    with pytest.raises(ValueError, match="frozen: unfreeze"):
        UpdateCapper(models.gpt2().requires_grad_(False), 0.1)
    with pytest.raises(ValueError, match="match at least one"):
        models.trainer([UpdateCap(modules="none")]).fit(models.Job(), models.tokens())
