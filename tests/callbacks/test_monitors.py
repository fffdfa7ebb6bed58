"""The monitors in an existing job: numbers, cadence, and a training run that does not notice them."""

import lightning as L
import models
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_qk import AttentionMonitor, LocAteR, PositionMonitor, QKSpectrumMonitor, head_projections
from lightning_qk.callbacks.monitors._report import RECORD_NAME, REPORT_NAME
from lightning_qk.functional import attention_statistics, qk_moments
from lightning_qk.metrics.spectrum import QKSpectrum
from lightning_qk.record.history import RunRecord


def monitors(**kwargs) -> list:
    arguments = {"figures_every": 0, "report": False, **kwargs}
    spectrum = {name: value for name, value in arguments.items() if name != "every_n_eval_batches"}
    return [QKSpectrumMonitor(**spectrum), AttentionMonitor(rows=None, **arguments)]


def read_csv(folder) -> list[dict[str, str]]:
    import csv

    with open(folder / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_training_does_not_notice(implementation):
    def fit(callbacks):
        L.seed_everything(11, verbose=False)
        job = models.Job(models.gpt2(attn_implementation=implementation), optimizer="adamw")
        loader = models.tokens(64)
        shuffled = torch.utils.data.DataLoader(loader.dataset, batch_size=4, shuffle=True)
        models.trainer(callbacks, max_steps=10).fit(job, shuffled)
        return job, torch.get_rng_state()

    plain, rng = fit([])
    watched, rng_watched = fit([QKSpectrumMonitor(), AttentionMonitor(rows=5)])
    assert all(torch.equal(a, b) for a, b in zip(plain.losses, watched.losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert torch.equal(rng, rng_watched)


def test_spectrum_is_that_of_the_weights_after_the_step():
    spectrum, _ = callbacks = monitors()
    job = models.Job(lr=0.1)
    start = {name: qk_moments(head.query, head.key) for name, head in head_projections(job).items()}
    trainer = models.trainer(callbacks)
    trainer.fit(job, models.tokens())
    history = spectrum.history
    assert history.layers == ("layer_00", "layer_01")
    assert history.steps == [
        -1,
        0,
        1,
        2,
        3,
    ]  # where it started from, then every step under Lightning's number
    for index, moments in ((0, start), (-1, None)):
        now = moments or {
            name: qk_moments(head.query, head.key) for name, head in head_projections(job).items()
        }
        for statistic in ("eig_mean", "sym_var", "trace_sq"):
            want = torch.stack([value[statistic] for value in now.values()])
            torch.testing.assert_close(history.grid(statistic, index), want.detach())
    overall = history.values["sym_var"][-1]
    assert trainer.callback_metrics["qk/sym_var/mean"].item() == pytest.approx(overall.mean().item())
    assert trainer.callback_metrics["qk/sym_var/max"].item() == pytest.approx(overall.max().item())


def test_attention_is_pooled_over_the_micro_batches_of_a_step():
    _, attention = callbacks = monitors()
    job = models.Job(lr=0.0)
    for module in job.modules():  # the same forward again below
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loader = models.tokens(16, batch_size=4)
    models.trainer(callbacks, max_steps=1, accumulate_grad_batches=4).fit(job, loader)
    # One batch of everything, layer by layer, from hidden states.
    network = job.inner["network"].eval()
    everything = torch.cat(list(loader))
    with torch.no_grad():
        states = network(input_ids=everything, output_hidden_states=True).hidden_states
        for index, (block, head) in enumerate(
            zip(network.transformer.h, head_projections(network).values(), strict=True)
        ):
            x = block.ln_1(states[index])
            query = torch.einsum("hde,bne->bhnd", head.query, x) + head.query_bias[:, None]
            key = torch.einsum("hde,bne->bhnd", head.key, x) + head.key_bias[:, None]
            want = attention_statistics(query, key, is_causal=True, scaling=head.scaling)
            for statistic, value in want.items():
                got = attention.history.grid(statistic)[index]
                torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5, msg=statistic)


@pytest.mark.parametrize(
    ("every", "log_every", "accumulate", "steps"),
    [(None, 3, 1, [2, 5]), (2, 50, 1, [1, 3, 5, 7]), (1, 50, 4, [0, 1]), (None, 2, 2, [1, 3])],
)
def test_cadence(every, log_every, accumulate, steps, tmp_path):
    callbacks = monitors(every_n_steps=every)
    logger = CSVLogger(tmp_path)
    trainer = models.trainer(
        callbacks,
        max_steps=-1,
        max_epochs=1,
        log_every_n_steps=log_every,
        accumulate_grad_batches=accumulate,
        logger=logger,
    )
    trainer.fit(models.Job(), models.tokens(32))
    assert callbacks[1].history.steps == steps
    assert callbacks[0].history.steps == [-1, *steps]
    rows = read_csv(tmp_path / "lightning_logs" / "version_0")
    for key in ("qk/eig_var/mean", "attn/entropy/mean", "qk/layer_01/eig_var", "attn/layer_00/entropy"):
        assert [int(row["step"]) for row in rows if key in row] == steps
    if every is None:  # the same numbers as the loss
        assert [int(row["step"]) for row in rows if "train/loss" in row] == steps


def test_validation_is_not_training(tmp_path):
    def fit(**kwargs):
        L.seed_everything(2, verbose=False)
        _, attention = callbacks = monitors(**kwargs)
        calls = []
        hear = attention.measure_call
        attention.measure_call = lambda name, call: calls.append(name) or hear(name, call)
        models.trainer(callbacks, max_steps=4, val_check_interval=2, num_sanity_val_steps=2).fit(
            models.Job(), models.tokens(), models.tokens()
        )
        return attention.history, len(calls)

    with_validation, heard = fit()
    alone, heard_alone = fit(every_n_eval_batches=0)
    # Two layers: four training steps, and the first batch of each of two validations.
    assert (heard, heard_alone) == (4 * 2 + 2 * 2, 4 * 2)
    for name in alone.statistics:
        torch.testing.assert_close(
            with_validation.series(name), alone.series(name), rtol=0, atol=0, equal_nan=True
        )


def test_per_head_scalars_and_few_keys_by_default(tmp_path):
    for per_head in (False, True):
        logger = CSVLogger(tmp_path, version=str(per_head))
        models.trainer(monitors(per_head=per_head), max_steps=1, logger=logger).fit(
            models.Job(), models.tokens()
        )
        keys = set().union(*read_csv(tmp_path / "lightning_logs" / str(per_head)))
        assert ("attn/layer_01/head_03/entropy" in keys) == per_head
        assert ("qk/layer_01/head_03/eig_var" in keys) == per_head
        assert per_head or len(keys) < 120


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true", "64-true"])
def test_precisions(precision):
    spectrum, attention = callbacks = monitors()
    job = models.Job()
    models.trainer([*callbacks, LocAteR(0.1)], precision=precision).fit(job, models.tokens())
    assert spectrum.notes == attention.notes == []
    # Half-precision weights are read as they are and computed with in float32.
    head = next(iter(head_projections(job).values()))
    want = qk_moments(head.query.double(), head.key.double())["sym_var"]
    torch.testing.assert_close(spectrum.history.grid("sym_var")[0].double(), want, rtol=1e-4, atol=0)
    assert attention.history.series("entropy").isfinite().all()


def test_a_model_with_one_head():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=1,
        n_head=1,
        n_embd=32,
        vocab_size=models.VOCABULARY,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    spectrum, attention = callbacks = monitors()
    job = models.Job(models.build(GPT2LMHeadModel, config))
    models.trainer([*callbacks, LocAteR(0.1, form="target")]).fit(job, models.tokens())
    assert spectrum.notes == attention.notes == []
    assert attention.history.series("entropy").shape == (4, 1)
    assert spectrum.history.series("trace").shape == (5, 1)


def test_each_alone_and_wherever_the_models_hang(tmp_path):
    class Pair(models.Job):
        def __init__(self):
            super().__init__(models.llama())
            self.teacher = models.bert().requires_grad_(False)

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.teacher(input_ids=batch)
            return super().training_step(batch, batch_idx)

    for callback in (*monitors(), LocAteR(0.1)):
        trainer = models.trainer([callback])
        trainer.fit(Pair(), models.tokens())
        if isinstance(callback, LocAteR):
            assert "locater/penalty" in trainer.callback_metrics
        else:
            assert len(callback.history.layers) == 4
            assert all(value.isfinite().all() for value in callback.history.series(callback.witness))


def test_cross_attention():
    class Translate(models.Job):
        def training_step(self, batch, batch_idx):
            return self.inner["network"](input_ids=batch, labels=batch[:, :9].contiguous()).loss

    spectrum, attention = callbacks = monitors()
    models.trainer(callbacks).fit(Translate(models.t5()), models.tokens())
    cross = [index for index, label in enumerate(attention.history.layers) if "cross" in label]
    assert len(cross) == 2
    for index in range(6):
        is_cross = index in cross
        assert attention.history.grid("entropy")[index].isfinite().all()
        assert attention.history.grid("distance")[index].isnan().all() == is_cross
        assert spectrum.history.grid("trace")[index].isnan().all() == is_cross
        assert spectrum.history.grid("singular_max")[index].isfinite().all() == is_cross
    assert not [note for note in spectrum.notes + attention.notes if "finite" in note]


def test_weights_that_are_not_finite_are_named_and_training_goes_on():
    callbacks = monitors()
    job = models.Job(lr=0.0)
    with torch.no_grad():
        job.inner["network"].transformer.h[1].attn.c_attn.weight[:, 9] = torch.nan  # query of head 1
    trainer = models.trainer(callbacks)
    with pytest.warns(UserWarning, match="not finite") as caught:
        trainer.fit(job, models.tokens())
    assert trainer.global_step == 4
    messages = [str(w.message) for w in caught if "not finite" in str(w.message)]
    spectrum = [m for m in messages if m.startswith("QKSpectrumMonitor")]
    assert len(spectrum) == 1
    assert "before the first step in inner.network.transformer.h.1.attn (head 1):" in spectrum[0]
    attention = [m for m in messages if m.startswith("AttentionMonitor")]
    assert len(attention) == 1
    assert "at step 0 in inner.network.transformer.h.1.attn (head 1):" in attention[0]


def test_layers_without_a_captured_call_are_named_once():
    class Half(models.Job):
        def __init__(self):
            super().__init__()
            self.unused = models.bert()

    _, attention = callbacks = monitors()
    with pytest.warns(UserWarning, match="no attention call of 2 of 4 layers was seen"):
        models.trainer(callbacks).fit(Half(), models.tokens())
    assert len(attention.notes) == 1
    assert attention.history.grid("entropy")[:2].isfinite().all()


def test_a_monitor_that_fails_does_not_stop_training(monkeypatch):
    spectrum, attention = monitors()

    def fail(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(QKSpectrum, "update", fail)
    trainer = models.trainer([spectrum, attention])
    with pytest.warns(
        UserWarning, match=r"stopped measuring after 3 failures in a row \(RuntimeError: no memory\)"
    ):
        trainer.fit(models.Job(), models.tokens())
    assert trainer.global_step == 4
    assert len(attention.history) == 4


def test_history_survives_a_resume(tmp_path):
    def fit(steps, checkpoint=None):
        callbacks = monitors()
        L.seed_everything(3, verbose=False)
        trainer = models.trainer(callbacks, max_steps=steps, max_epochs=-1)
        trainer.fit(models.Job(), models.tokens(), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return callbacks

    fit(3)
    spectrum, attention = fit(6, tmp_path / "last.ckpt")
    assert attention.history.steps == [0, 1, 2, 3, 4, 5]
    assert spectrum.history.steps == [-1, 0, 1, 2, 3, 4, 5]


class TestReport:
    def fit(self, tmp_path, callbacks, fail_at=None):
        class Fails(models.Job):
            def training_step(self, batch, batch_idx):
                if batch_idx == fail_at:
                    raise RuntimeError("the user's own error")
                return super().training_step(batch, batch_idx)

        trainer = models.trainer(callbacks, logger=CSVLogger(tmp_path))
        trainer.fit(Fails(), models.tokens())

    def test_one_report_of_all(self, tmp_path, capsys):
        self.fit(tmp_path, [QKSpectrumMonitor(), LocAteR(0.1), AttentionMonitor()])
        folder = tmp_path / "lightning_logs" / "version_0"
        page = (folder / REPORT_NAME).read_text()
        assert "GPT2LMHeadModel" in page
        assert "layer_01" in page
        record = RunRecord.load(folder / RECORD_NAME)
        assert record.spectrum is not None
        assert record.attention is not None
        assert record.scalars["locater/penalty"][0] == [0, 1, 2, 3]
        assert set(record.eigenvalues) == {"layer_00", "layer_01"}
        assert record.eigenvalues_step == 3
        kept = record.snapshots["eigenvalues"]
        assert kept.steps[0] == -1
        assert kept.steps[-1] == 3
        assert torch.equal(kept.values[-1]["layer_01"], record.eigenvalues["layer_01"])
        curves = record.snapshots["linear_profile"]
        assert curves.steps == [0, 1, 2]  # the first steps, in doubling distance
        assert curves.values[0]["layer_00"].shape[1] == 10
        share = record.attention.series("linear_share")[0]
        # Over 16 keys and more, of few sequences: near the share of all.
        assert float(curves.values[0]["layer_00"].mean()) == pytest.approx(
            float(share[: len(curves.values[0]["layer_00"])].mean()), abs=0.2
        )
        shape = record.shapes["layer_00"]
        assert shape.scaling == pytest.approx(shape.d_head**-0.5)
        assert shape.d_model > shape.d_head
        printed = capsys.readouterr().out
        assert "layer_01" in printed
        assert printed.count(REPORT_NAME) == 1

    def test_what_was_seen_is_kept_when_training_fails(self, tmp_path):
        from transformers.modeling_utils import AttentionInterface

        before = AttentionInterface.get_interface
        with pytest.raises(RuntimeError, match="the user's own error"):
            self.fit(tmp_path, [QKSpectrumMonitor(), AttentionMonitor()], fail_at=3)
        record = RunRecord.load(tmp_path / "lightning_logs" / "version_0" / RECORD_NAME)
        assert record.attention.steps == [0, 1, 2]
        assert AttentionInterface.get_interface is before

    def test_none_when_asked_or_in_a_fast_dev_run(self, tmp_path):
        self.fit(tmp_path, [QKSpectrumMonitor(report=False), AttentionMonitor(report=False)])
        models.trainer([QKSpectrumMonitor()], fast_dev_run=True, default_root_dir=tmp_path).fit(
            models.Job(), models.tokens()
        )
        assert not list(tmp_path.rglob(REPORT_NAME))

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "lightning_qk.report.report.write_report",
            lambda *args: (_ for _ in ()).throw(OSError("no space left")),
        )
        with pytest.warns(UserWarning, match="report could not be written") as seen:
            self.fit(tmp_path, [QKSpectrumMonitor(), AttentionMonitor()])
        assert sum("report could not be written" in str(one.message) for one in seen) == 1
        assert not list(tmp_path.rglob("*.partial"))

    def test_a_curve_that_fails_leaves_the_statistics(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "lightning_qk.callbacks.monitors.attention.profile_sums",
            lambda **_: (_ for _ in ()).throw(RuntimeError("too large")),
        )
        with pytest.warns(UserWarning, match="stopped measuring the report's curves over positions"):
            self.fit(tmp_path, [AttentionMonitor()])
        record = RunRecord.load(tmp_path / "lightning_logs" / "version_0" / RECORD_NAME)
        assert record.attention.steps == [0, 1, 2, 3]
        assert record.attention.series("entropy").isfinite().all()

    def test_snapshots_survive_a_checkpoint(self, tmp_path):
        first = [QKSpectrumMonitor(report=False), AttentionMonitor()]
        self.fit(tmp_path, first)
        for before in first:
            state = before.state_dict()
            after = type(before)()
            after.load_state_dict(state)
            assert after.state_dict()["snapshots"]["steps"] == state["snapshots"]["steps"]
            assert (
                after.state_dict()["snapshots"]["values"][0].keys() == state["snapshots"]["values"][0].keys()
            )


class TestErrors:
    def test_a_module_without_a_transformer(self):
        job = models.Job(torch.nn.Linear(2, 2))
        for callback in monitors():
            callback.on_unreadable = "raise"
            with pytest.raises(ValueError, match="expected a model that contains transformer attention"):
                models.trainer([callback]).fit(job, models.tokens())

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: QKSpectrumMonitor(every_n_steps=0), "every_n_steps to be at least 1"),
            (lambda: QKSpectrumMonitor(support="all"), "support to be"),
            (lambda: AttentionMonitor(rows=0), "rows to be at least 1"),
            (lambda: AttentionMonitor(figures_every=-1), "figures_every"),
        ],
    )
    def test_bad_arguments(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


def test_layers_left_out_for_one_reason_are_one_sentence():
    from transformers.modeling_utils import AttentionInterface

    def own_kernel(module, query, key, value, attention_mask, **kwargs):
        return value.cumsum(2).transpose(1, 2).contiguous(), None

    AttentionInterface.register("own_kernel", own_kernel)
    try:
        model = models.gpt2()
        model.set_attn_implementation("own_kernel")
        callbacks = [AttentionMonitor(report=False), PositionMonitor(report=False)]
        with pytest.warns(
            UserWarning, match=r"\(2 layers\) are left out: the output of attention function 'own_kernel'"
        ) as said:
            models.trainer(callbacks).fit(models.Job(model), models.tokens())
    finally:
        AttentionInterface._global_mapping.pop("own_kernel")
    assert all(len(callback.notes) == 1 for callback in callbacks)
    # The reason is not repeated by whoever cannot measure them either.
    told = [str(one.message) for one in said if "left out" in str(one.message)]
    assert len(told) == 2
    assert told[1].endswith("(2 layers) are left out, as said above")
