"""AttentionProbes: what it runs, when, and that training does not notice."""

import csv
import warnings

import lightning as L
import models
import pytest
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger
from test_monitors import read_csv
from torch.utils.data import DataLoader

from lightning_qk import AttentionMonitor, AttentionProbes, HeadReport, QKSpectrumMonitor, locater_penalty
from lightning_qk.callbacks.monitors.probes import HEADS_NAME
from lightning_qk.probes import (
    attention_as_explanation,
    exchangeability,
    irrelevant_mass,
    parallel_context_entropy,
)
from lightning_qk.record.history import RunRecord


def quick(probes=("exchangeability",), **kwargs) -> AttentionProbes:
    return AttentionProbes(probes, **{"permutations": 1, "tokens": 4, **kwargs})


def flat(values: dict) -> torch.Tensor:
    return torch.cat(list(values.values()))


def test_values_are_those_of_the_functions(tmp_path):
    job = models.Job()
    callback = AttentionProbes(
        ["explanation", "exchangeability", "parallel_context", "irrelevant"],
        batches=2,
        tokens=5,
        irrelevant=[4, 7, 9],
        seed=3,
        per_layer=True,
        per_head=True,
    )
    trainer = models.trainer([callback], logger=CSVLogger(tmp_path))
    trainer.validate(job, models.tokens(12), verbose=False)
    assert callback.notes == []
    network, data = job.inner["network"], list(models.tokens(12))[:2]

    def mean(probe) -> torch.Tensor:
        found = [flat(probe({"input_ids": ids})) for ids in data]
        return torch.stack(found).nanmean(0)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    wanted = {
        "explanation": mean(lambda b: attention_as_explanation(network, b, tokens=5, generator=generator())),
        "exchangeability": mean(lambda b: exchangeability(network, b, generator=generator())),
        "parallel_entropy_whole": mean(lambda b: parallel_context_entropy(network, b).whole),
        "parallel_entropy_parts": mean(lambda b: parallel_context_entropy(network, b).parts),
        "parallel_entropy_ratio": mean(lambda b: parallel_context_entropy(network, b).ratio),
        "irrelevant_mass": mean(
            lambda b: irrelevant_mass(network, b, torch.isin(b["input_ids"], torch.tensor([4, 7, 9])))
        ),
    }
    (row,) = [
        row for row in read_csv(tmp_path / "lightning_logs" / "version_0") if "probe/explanation/mean" in row
    ]
    for name, values in wanted.items():
        assert torch.allclose(callback.history.series(name)[0], values, atol=1e-6, rtol=1e-5), name
        for reduction in ("mean", "min", "max"):
            key = f"probe/{name}/{reduction}"
            want = pytest.approx(getattr(values, reduction)().item(), rel=1e-4, abs=1e-6)
            assert trainer.callback_metrics[key].item() == want
            assert key not in row if reduction != "mean" else float(row[key]) == want  # loggers get the mean
        layer = float(row[f"probe/layer_01/{name}"])
        assert layer == pytest.approx(values[4:].mean().item(), rel=1e-4, abs=1e-6)
        assert float(row[f"probe/layer_00/head_02/{name}"]) == pytest.approx(
            values[2].item(), rel=1e-4, abs=1e-6
        )
    assert not any(value.is_inference() for value in job.buffers())


class Padded(models.Job):
    """Takes dicts, calls its network twice a batch, with positional arguments and labels."""

    def validation_step(self, batch, batch_idx):
        network = self.inner["network"]
        network(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
        network(batch["input_ids"][:, :4])
        batch["input_ids"].zero_()  # its own, to do with as it likes


def test_any_users_batches():
    ids = torch.randint(3, models.VOCABULARY, (4, 12))
    mask = torch.ones_like(ids)
    mask[2:, 8:] = 0
    data = [
        {"input_ids": row, "attention_mask": keep, "labels": row} for row, keep in zip(ids, mask, strict=True)
    ]
    job = Padded(models.bert())
    callback = quick(["exchangeability"], batches=1)
    models.trainer([callback]).validate(job, DataLoader(data, batch_size=4), verbose=False)
    assert callback.notes == []
    want = exchangeability(job.inner["network"], {"input_ids": ids, "attention_mask": mask}, permutations=1)
    torch.testing.assert_close(callback.history.series("exchangeability")[0], flat(want))


class Counting(models.Job):
    """Counts the runs of its network in validation and training."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.runs = []
        self.inner["network"].register_forward_pre_hook(
            lambda *_: self.runs.append("train" if self._is_training() else "other")
        )

    def _is_training(self) -> bool:
        return self.inner["network"].training


def test_every_nth_validation_and_never_the_sanity_check_or_training():
    job = Counting()
    callback = quick(every_n_validations=2)
    trainer = models.trainer(
        [callback], max_steps=6, val_check_interval=2, num_sanity_val_steps=1, limit_val_batches=1
    )
    trainer.fit(job, models.tokens(), models.tokens(8))
    assert job.runs.count("train") == 6
    # One for the sanity check, one a validation; two runs of the probe in the first and the third.
    assert job.runs.count("other") == 1 + 3 + 2 * 2
    assert len(callback.history) == 2
    assert callback.history.steps == [1, 5]  # those of Lightning's own rows
    again = quick(every_n_validations=2)
    again.load_state_dict(callback.state_dict())
    assert again._validations == 3


def fit(callbacks, **kwargs):
    L.seed_everything(11, verbose=False)
    job = models.Job(loss=lambda module: 0.01 * locater_penalty(module))
    models.trainer(callbacks, val_check_interval=2, **kwargs).fit(job, models.tokens(), models.tokens(8))
    return job, torch.get_rng_state()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_does_not_notice(precision):
    """The penalty's reader is made by a probe, in a validation, before it is needed for gradients."""
    callback = AttentionProbes(tokens=4, heads=True)
    plain, state = fit([], precision=precision)
    watched, other = fit([callback], precision=precision)
    assert callback.notes == []
    assert len(callback.history) == 2
    assert callback.history.series("exchangeability").isfinite().all()
    assert callback.head_report is not None
    assert torch.equal(state, other)
    assert all(torch.equal(a, b) for a, b in zip(plain.losses, watched.losses, strict=True))
    for one, two in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("first", [True, False])
def test_other_monitors_do_not_hear_the_probes(first, tmp_path):
    def validate(callbacks):
        monitor = AttentionMonitor(rows=None, figures_every=0, report=False)
        both = [*callbacks, monitor] if first else [monitor, *callbacks]
        trainer = models.trainer(both)
        torch.manual_seed(0)
        trainer.validate(models.Job(), models.tokens(4), verbose=False)
        return {key: value for key, value in trainer.callback_metrics.items() if key.startswith("attn/")}

    alone, together = validate([]), validate([quick()])
    assert alone
    assert all(torch.equal(value, together[key]) for key, value in alone.items())


def test_a_probe_that_fails_is_named_once_and_the_others_go_on():
    job = models.Job(models.mistral())  # its windows are shorter than the sequences
    callback = quick(["parallel_context", "exchangeability"])
    with pytest.warns(
        UserWarning, match=r"the probe parallel_context failed once \(ValueError: .*MistralForCausalLM"
    ):
        models.trainer([callback], val_check_interval=2).fit(job, models.tokens(), models.tokens(8))
    assert len(callback.notes) == 1
    assert callback.history.series("exchangeability").isfinite().all()
    assert callback.history.series("parallel_entropy_ratio").isnan().all()
    assert job.trainer.global_step == 4


def test_layers_that_are_left_out_are_noted_and_other_warnings_pass():
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=models.VOCABULARY)
    job = models.Job(models.build(transformers.BloomForCausalLM, config))

    def marks(call):
        warnings.warn("a word of the user's", RuntimeWarning, stacklevel=1)
        return call["input_ids"] < 20

    callback = quick(["exchangeability", "irrelevant"], irrelevant=marks)
    with pytest.warns(RuntimeWarning, match="a word of the user's"):
        models.trainer([callback]).validate(job, models.tokens(8), verbose=False)
    (note,) = callback.notes
    assert "the probe exchangeability" in note
    assert "values are not known" in note
    assert callback.history.series("irrelevant_mass").isfinite().all()


class Generating(models.Job):
    def validation_step(self, batch, batch_idx):
        self.inner["network"].generate(batch, max_new_tokens=3, do_sample=False)


def test_steps_of_generation_do_not_count_but_the_prompt_does():
    job = Generating(models.llama())
    callback = quick(["exchangeability", "parallel_context"])
    models.trainer([callback]).validate(job, models.tokens(4), verbose=False)
    assert callback.notes == []
    want = exchangeability(job.inner["network"], {"input_ids": next(iter(models.tokens(4)))}, permutations=1)
    torch.testing.assert_close(callback.history.series("exchangeability")[0], flat(want))


def test_no_transformer_is_said_once():
    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def validation_step(self, batch, batch_idx):
            self.layer(batch)

    callback = quick(heads=True)
    trainer = models.trainer([callback])
    with pytest.warns(UserWarning, match="no transformers model was found in Plain"):
        trainer.validate(Plain(), DataLoader(torch.zeros(4, 2)), verbose=False)
    assert callback.notes == [callback.notes[0]]


def test_heads_are_classed_into_the_runs_folder(tmp_path, capsys):
    job = models.Job()
    callback = quick(heads=True)
    logger = CSVLogger(tmp_path)
    trainer = models.trainer([callback], logger=logger, val_check_interval=4)
    trainer.fit(job, models.tokens(), models.tokens(8))
    folder = tmp_path / "lightning_logs" / "version_0"
    with (folder / HEADS_NAME).open() as file:
        kinds = [line["kind"] for line in csv.DictReader(file)]
    want = HeadReport.from_model(job.inner["network"], [next(iter(models.tokens(8)))])
    assert kinds == [row.kind for row in want.rows]
    logged = {key: float(value) for row in read_csv(folder) for key, value in row.items()}
    for kind, count in want.counts().items():
        assert logged[f"probe/heads/{kind}"] == count == trainer.callback_metrics[f"probe/heads/{kind}"]
    assert "Heads: " in capsys.readouterr().out


def test_the_report_has_the_probes_curves(tmp_path):
    callback, spectrum = quick(), QKSpectrumMonitor()
    trainer = models.trainer([callback, spectrum], logger=CSVLogger(tmp_path), val_check_interval=2)
    trainer.fit(models.Job(), models.tokens(), models.tokens(8))
    (path,) = tmp_path.rglob("lightning_qk_record.safetensors")
    steps, values = RunRecord.load(path).scalars["probe/exchangeability/mean"]
    rows = read_csv(path.parent)
    assert steps == [int(row["step"]) for row in rows if "val/loss" in row] == [1, 3]
    assert steps == [int(row["step"]) for row in rows if "probe/exchangeability/mean" in row]
    assert values == pytest.approx(callback.history.series("exchangeability").mean(1).tolist())


def test_a_compiled_model_is_probed_eagerly_and_keeps_its_graphs():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    job = models.Job()
    torch.compiler.reset()
    network = job.inner["network"]
    job.inner["network"] = torch.compile(network, backend=backend)
    callback = quick(["explanation", "exchangeability"])
    trainer = models.trainer([callback])
    trainer.validate(job, models.tokens(4), verbose=False)
    assert callback.notes == []
    count = len(graphs)
    assert count > 0
    trainer.validate(job, models.tokens(4), verbose=False)
    assert len(graphs) == count
    want = exchangeability(network, {"input_ids": next(iter(models.tokens(4)))}, permutations=1)
    torch.testing.assert_close(callback.history.series("exchangeability")[0], flat(want))


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_that_is_seen_by_no_hook_is_named(whole):
    """Hooks inside a graph would be traced, and break it."""
    torch.compiler.reset()
    job = models.Job()
    module = job
    if whole:
        module = torch.compile(job, backend="eager")
    else:
        job.inner["network"].compile(backend="eager")
    callback = quick(["exchangeability"])
    with pytest.warns(UserWarning, match="inside a compiled graph cannot be seen"):
        models.trainer([callback]).validate(module, models.tokens(4), verbose=False)
    assert len(callback.history) == 0


def test_sharded_models_are_not_run(monkeypatch):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    monkeypatch.setattr("lightning_qk.callbacks.monitors.probes._SHARDING", SingleDeviceStrategy)
    job = Counting()
    callback = quick(heads=True)
    with pytest.warns(UserWarning, match="models sharded by SingleDeviceStrategy are not probed"):
        models.trainer([callback]).validate(job, models.tokens(4), verbose=False)
    assert job.runs == ["other"]
    assert callback.head_report is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"probes": ["explanations"]}, "probes among explanation"),
        ({"probes": "explanation"}, "a list of strings"),
        ({"probes": ["irrelevant"]}, "together"),
        ({"irrelevant": [3]}, "together"),
        ({"every_n_validations": 0}, "every_n_validations of at least 1, got 0"),
        ({"tokens": 1}, "tokens of at least 2, got 1"),
        ({"batches": 0}, "batches of at least 1"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        AttentionProbes(**arguments)
