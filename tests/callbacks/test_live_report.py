"""The report while a run goes on: it follows the steps, holds nothing up, and never ends a run."""

import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_qk.callbacks.monitors import AttentionMonitor, QKSpectrumMonitor
from lightning_qk.callbacks.monitors import _live as live
from lightning_qk.record.history import RunRecord

PAGE, RECORD = "lightning_qk_report.html", "lightning_qk_record.safetensors"


class Job(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16)
        self.net = AutoModelForCausalLM.from_config(config)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.net(input_ids=batch, labels=batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class After(L.Callback):
    """Waits for the page after each step, and calls what it is given."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        for thread in threading.enumerate():
            if thread.name == "lightning-qk-report":
                thread.join()
        self.look(trainer)


def fit(folder: Path, *callbacks: L.Callback, steps: int = 6, **options: Any) -> Job:
    job = Job()
    data = torch.randint(0, 32, (4 * steps, 16), generator=torch.Generator().manual_seed(0))
    trainer = L.Trainer(
        max_steps=steps, log_every_n_steps=2, logger=False, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(job, torch.utils.data.DataLoader(data, batch_size=4))
    return job


def monitors(every: float | None = 1e-9) -> list[L.Callback]:
    return [QKSpectrumMonitor(figures_every=0, report_every=every), AttentionMonitor(figures_every=0)]


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_SHARE", 1e9)


def test_the_page_follows_the_run(tmp_path: Path) -> None:
    seen = []

    def look(trainer: L.Trainer) -> None:
        if (tmp_path / PAGE).exists():
            text, record = (tmp_path / PAGE).read_text(encoding="utf-8"), RunRecord.load(tmp_path / RECORD)
            assert record.spectrum is not None
            assert record.attention is not None
            # Both have the same step: the page comes after the last of the monitors.
            assert record.attention.steps[-1] == record.spectrum.steps[-1]
            assert "data-written" in text
            seen.append((record.info["State"], record.attention.steps[-1]))

    fit(tmp_path, *monitors(), After(look))
    assert dict(seen) == {"running at step 2 of 6": 1, "running at step 4 of 6": 3}
    text = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "data-written" not in text
    assert RunRecord.load(tmp_path / RECORD).info["State"] == "finished at step 6 of 6"
    assert not {"Session", "SelfCheck"} & set(RunRecord.load(tmp_path / RECORD).info)  # no choice of the job
    assert not list(tmp_path.glob(".*partial*"))


def test_a_monitor_that_measures_seldom_holds_nothing_back(tmp_path: Path) -> None:
    steps = []

    def look(trainer: L.Trainer) -> None:
        if (tmp_path / RECORD).exists():
            steps.append(RunRecord.load(tmp_path / RECORD).spectrum.steps[-1])  # type: ignore[union-attr]

    own = [QKSpectrumMonitor(figures_every=0, report_every=1e-9), AttentionMonitor(5, figures_every=0)]
    fit(tmp_path, *own, After(look))
    assert sorted(set(steps)) == [1, 3]


def test_the_loss_is_that_of_the_measured_steps(tmp_path: Path) -> None:
    job = fit(tmp_path, *monitors(0))
    steps, values = RunRecord.load(tmp_path / RECORD).scalars["train/loss"]
    assert steps == [1, 3, 5]
    assert values == pytest.approx([job.losses[i] for i in steps], rel=1e-5)


def test_the_loss_with_accumulation(tmp_path: Path) -> None:
    job = fit(tmp_path, *monitors(0), steps=2, accumulate_grad_batches=2)
    steps, values = RunRecord.load(tmp_path / RECORD).scalars["train/loss"]
    # Two batches are an epoch and a step, and an epoch's last step is measured.
    assert (steps, len(job.losses)) == ([0, 1], 4)
    assert values == pytest.approx([sum(job.losses[i : i + 2]) / 2 for i in (0, 2)], rel=1e-5)


def test_training_is_the_same(tmp_path: Path) -> None:
    with_page, without = fit(tmp_path / "a", *monitors()), fit(tmp_path / "b")
    assert with_page.losses == without.losses


@pytest.mark.parametrize("what", ["page", "record", "gather"])
def test_a_fault_is_said_and_training_goes_on(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **options: Any) -> Any:
        raise OSError("disk full")

    name = {"page": "lightning_qk.report.report.write_report", "record": "", "gather": ""}[what]
    if name:
        monkeypatch.setattr(name, fail)
    if what == "record":
        monkeypatch.setattr(RunRecord, "save", fail)
    if what == "gather":
        monkeypatch.setattr(live, "gather", fail)
    own = monitors()
    with pytest.warns(UserWarning, match="rewriting the report failed once .*disk full"):
        job = fit(tmp_path, *own, After(lambda trainer: None), steps=10)
    assert len(job.losses) == 10
    assert any("rewriting the report" in one for one in own[1].notes)
    assert own[1].history.steps == [1, 3, 5, 7, 9]


def test_a_slow_disk_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one page is being written no other is begun, and training goes on beside it."""
    may_end, began = threading.Event(), []
    write = live.LivePage._write

    def slow(self: live.LivePage, record: RunRecord, folder: Path) -> None:
        began.append(threading.current_thread().name)
        assert may_end.wait(60)
        write(self, record, folder)

    monkeypatch.setattr(live.LivePage, "_write", slow)

    class Last(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 6:
                assert not (tmp_path / PAGE).exists()
                may_end.set()

    fit(tmp_path, *monitors(), Last())
    # One, and after it perhaps another.
    assert began[0] == "lightning-qk-report"
    assert len(began) <= 2
    # The last page is the last: the slow one did not come after it.
    assert "data-written" not in (tmp_path / PAGE).read_text(encoding="utf-8")


def test_how_often(tmp_path: Path) -> None:
    """No earlier than asked for, and no more than a share of the time."""
    now = [0.0]
    page = live.LivePage(10.0, clock=lambda: now[0])
    begun = []
    page.rewrite = lambda *args: begun.append(now[0]) or setattr(page, "_next", now[0] + page.every)  # type: ignore[method-assign]
    for second in range(35):
        now[0] = float(second)
        page.keep(None, None, tmp_path)  # type: ignore[arg-type]
    assert begun == [0.0, 10.0, 20.0, 30.0]
    assert live.LivePage.as_asked([None, 7.0, None]).every == 7.0
    assert live.LivePage.as_asked([None]).every == 30.0
    assert live.LivePage.as_asked([0, 7.0]).every == 0


def test_a_long_write_comes_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_SHARE", 0.05)
    now = [100.0]
    page = live.LivePage(10.0, clock=lambda: now[0])

    def save(self: RunRecord, path: Path) -> Path:
        now[0] += 3.0
        return path

    monkeypatch.setattr(RunRecord, "save", save)
    page._write(RunRecord(), tmp_path)
    assert page._next == pytest.approx(100 + 3 / 0.05)


def test_nothing_before_the_end_where_asked(tmp_path: Path) -> None:
    seen = []
    fit(tmp_path, *monitors(0), After(lambda trainer: seen.append((tmp_path / PAGE).exists())))
    assert not any(seen)
    assert (tmp_path / PAGE).exists()


def test_how_a_run_ended(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 4:
                raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, *monitors(), Fails())
    state = RunRecord.load(tmp_path / RECORD).info["State"]
    assert state.startswith("failed with RuntimeError: out of luck at step ")
    assert "Failed with RuntimeError: out of luck" in (tmp_path / PAGE).read_text(encoding="utf-8")


def test_a_frozen_record_stays(tmp_path: Path) -> None:
    monitor = QKSpectrumMonitor(figures_every=0)
    fit(tmp_path, monitor)
    record = RunRecord()
    monitor.contribute(record)
    still = live.frozen(record)
    before = still.spectrum.series("trace").clone()  # type: ignore[union-attr]
    monitor.history.append(99, {"trace": torch.ones(2)})
    monitor.history.append(5, {"trace": torch.zeros(2)})
    assert torch.equal(still.spectrum.series("trace"), before)  # type: ignore[union-attr]


@pytest.mark.parametrize("every", [-1, float("inf"), float("nan")])
def test_wrong_seconds_are_refused(every: float) -> None:
    with pytest.raises(ValueError, match="expected report_every to be 0"):
        AttentionMonitor(report_every=every)
