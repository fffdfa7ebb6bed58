"""The self-check of a fit: run by whichever callback is there, with the right word on every layer."""

import itertools
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_qk import AttentionMonitor, LocAteR, QKSpectrumMonitor
from lightning_qk.callbacks._self_check import SelfCheck, _agreed
from lightning_qk.functional import qk_moments
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.verification import Status, Verified

WIDTH, HEADS = 16, 4


class KeyFirst(nn.Module):
    """Its projection has a name that means [Q|K|V] elsewhere, and is cut as [k|q|v]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(out.transpose(1, 2).flatten(2))


class TableAttention(nn.Module):
    """Cannot be run alone: its forward wants an argument that nobody can guess."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, table: dict[str, float]) -> Tensor:
        q, k, v = (
            own(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for own in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = (q @ k.mT * table["scale"]).softmax(-1)
        return x + (weights @ v).transpose(1, 2).flatten(2)


class SeparateAttention(nn.Module):
    """Self-attention whose forward takes queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (
            own(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for own, x in zip(self.inner, (queries, keys, values), strict=True)
        )
        return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Network(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.attention = {
            "key_first": KeyFirst,
            "needs_table": TableAttention,
            "separate": SeparateAttention,
        }[kind]()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "needs_table":
            return self.attention(x, {"scale": 0.25})
        return self.attention(x, x, x) if self.kind == "separate" else self.attention(x)


class Job(L.LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Network(kind)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch) - batch.roll(1, 1)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(*callbacks: L.Callback, steps: int = 4) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        log_every_n_steps=2,
        logger=False,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def loader(steps: int = 4) -> DataLoader[Tensor]:
    torch.manual_seed(1)
    return DataLoader(torch.randn(8 * steps, 5, WIDTH), batch_size=8)


def fit(kind: str, *callbacks: L.Callback, steps: int = 4) -> tuple[Job, L.Trainer]:
    job, trainer = Job(kind), trainer_of(*callbacks, steps=steps)
    trainer.fit(job, loader(steps))
    return job, trainer


def expected(job: Job) -> Tensor:
    """tr W_QK of each head, from the layer's own definition."""
    layer = job.net.attention
    if isinstance(layer, KeyFirst):
        key, query, _ = layer.qkv.weight.chunk(3)
    elif isinstance(layer, TableAttention):
        query, key = layer.q_proj.weight, layer.k_proj.weight
    else:
        query, key = (own.weight for own in layer.inner[:2])
    query, key = (rows.unflatten(0, (HEADS, -1)) for rows in (query, key))
    return qk_moments(query, key)["trace"]


@pytest.mark.parametrize("kind", ["key_first", "needs_table", "separate"])
def test_every_layer_is_verified_and_right(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    monitor, attention = QKSpectrumMonitor(report=False), AttentionMonitor(report=False)
    with caplog.at_level("INFO"):
        job, trainer = fit(kind, monitor, attention)
    assert "spectra verified on 1 of 1 layers" in caplog.text
    assert monitor.history is not None
    got = monitor.history.series("trace")[-1]
    torch.testing.assert_close(got, expected(job).detach(), rtol=1e-5, atol=1e-6)
    assert list(monitor.labels.values()) == ["attention"]
    assert "qk/trace/mean" in trainer.callback_metrics
    assert not any("left out" in note or "nothing is watched" in note for note in monitor.notes)
    assert job.losses == fit(kind)[0].losses
    assert not any(isinstance(callback, SelfCheck) for callback in trainer.callbacks)


@pytest.mark.parametrize("kind", ["key_first", "separate"])
def test_a_layer_of_ones_own_is_penalized(kind: str) -> None:
    with_it, _ = fit(kind, QKSpectrumMonitor(report=False), LocAteR(1.0))
    without, _ = fit(kind)
    assert with_it.losses != without.losses


def test_a_layer_that_differs_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lightning_qk.heads import layer as plan

    right = plan.LayerReader.read

    def wrong(self: Any) -> Any:
        import dataclasses

        own = right(self)
        return dataclasses.replace(own, query=own.query.roll(1, 1))

    monkeypatch.setattr(plan.LayerReader, "read", wrong)
    monitor = QKSpectrumMonitor(report=False)
    with pytest.warns(UserWarning, match="left out: its .* are not W x"):
        job, trainer = fit("key_first", monitor)
    assert not any(key.startswith("qk/") for key in trainer.callback_metrics)
    assert job.losses == fit("key_first")[0].losses


def test_a_second_fit_checks_again() -> None:
    monitor = QKSpectrumMonitor(report=False)
    for kind in ("key_first", "separate"):
        job, _ = fit(kind, monitor)
        assert monitor.history is not None
        got = monitor.history.series("trace")[-1]
        torch.testing.assert_close(got, expected(job).detach(), rtol=1e-5, atol=1e-6)


class LoopAttention(nn.Module):
    """Two heads one after the other: their softmaxes are not one attention, and cannot be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH // 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for head in self.heads:
            q, k, v = head(x).chunk(3, dim=-1)
            parts.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
        return torch.cat(parts, dim=-1)


class Pair(Job):
    """Attention to other tokens, beside a layer that cannot be checked."""

    def __init__(self) -> None:
        super().__init__("separate")
        self.loop = LoopAttention()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        other = batch.roll(1, 0)[:, :3]
        out = self.loop(batch) + self.net.attention(batch, other, other)
        return (out - batch.roll(1, 1)).square().mean()


def test_layers_are_read_again_only_where_something_new_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that stays unchecked is no news at each step: to read layers of one's own takes their forwards."""
    plans: list[int] = []
    plan = ProjectionReader._plan

    def counted(self: ProjectionReader, model: nn.Module) -> None:
        plans.append(trainer.global_step)
        plan(self, model)

    monkeypatch.setattr(ProjectionReader, "_plan", counted)
    monitor = QKSpectrumMonitor(report=False)
    trainer = trainer_of(monitor)
    trainer.fit(Pair(), loader())

    assert monitor.labels == {"loop": "loop", "net.attention": "cross_attention"}
    assert max(plans) == 0
    # By the check and by the monitor, and by the monitor once more when the check has told it of the other tokens.
    assert len(plans) <= 5


def test_processes_act_on_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever each of them saw: what follows has collective calls, for which one must not go alone."""
    statuses = [
        Verified(status, 0.0, 0.0, "", of_itself)
        for status in (Status.VERIFIED, Status.REREAD, Status.DIFFERS)
        for of_itself in (True, False, None)
    ]
    words = [*statuses, Verified(Status.UNCHECKED, float("nan"), float("nan"))]
    pairs = list(itertools.product(words, words))
    seen = [{str(index): pair[rank] for index, pair in enumerate(pairs)} for rank in range(2)]
    sent: list[Any] = []

    def send(every: list[Any], own: Any) -> None:
        sent.append(own)

    def receive(every: list[Any], own: Any) -> None:
        every[:] = sent

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    trainer: Any = SimpleNamespace(world_size=2)
    # What each sends, then what each makes of both.
    monkeypatch.setattr(torch.distributed, "all_gather_object", send)
    for own in seen:
        assert _agreed(trainer, own) is None
    monkeypatch.setattr(torch.distributed, "all_gather_object", receive)
    first, other = (_agreed(trainer, own) for own in seen)

    assert first is not None
    assert other is not None
    assert list(first) == list(seen[0])
    for name, verdict in first.items():
        assert verdict[::4] == other[name][::4], pairs[int(name)]
