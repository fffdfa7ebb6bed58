"""The formulas of what callbacks cost, against counts of what they do."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_qk import LocAteR
from lightning_qk.callbacks.interventions._step_inputs import StepInputs
from lightning_qk.cli import main
from lightning_qk.functional import AttentionLogits
from lightning_qk.functional.attention import attention_sums
from lightning_qk.functional.hidden import hidden_sums
from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.inspect import cost
from lightning_qk.metrics.attention import AttentionStatistics
from lightning_qk.metrics.hidden import HiddenStatistics
from lightning_qk.metrics.spectrum import QKSpectrum
from lightning_qk.regularizers import latents, locater, stacks
from lightning_qk.regularizers.locater import LocaterPenalty
from lightning_qk.regularizers.settings import LIMIT, Settings

SETTINGS = Settings("variance", "model", None, 1.0)
SIZES = [
    {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32},
    {"num_hidden_layers": 9, "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64},
]


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def flops(action: Callable[[], object]) -> int:
    """Of the products of an action."""
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def calls(action: Callable[[], object]) -> int:
    """Of torch's operators."""
    with torch.no_grad(), _Calls() as mode:
        action()
    return mode.count


def llama(sizes: dict[str, int]) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(**sizes, intermediate_size=16, vocab_size=16)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def widths(model: transformers.PreTrainedModel, folder: Path) -> cost.Widths:
    model.config.save_pretrained(folder)
    return cost.read_widths(folder)


class Step:
    """What the callback does in a step of a trainer, form by form: what it samples, pools and adds."""

    def __init__(self, model: transformers.PreTrainedModel, form: str, ranks: int = 1) -> None:
        reader = ProjectionReader(model)
        self.penalty = LocaterPenalty(reader, by_tokens=form == "limit", limited=form == "limit")
        self.parameters, self.form = list(model.parameters()), form
        self.inputs: StepInputs | None = None
        ids = torch.randint(16, (2, 96))
        self.forward = lambda: model(input_ids=ids)
        if form == "limit":
            trainer: Any = SimpleNamespace(
                accumulate_grad_batches=1,
                world_size=ranks,
                global_rank=0,
                strategy=SimpleNamespace(root_device=torch.device("cpu")),
                fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=0)),
            )
            widths = {name: reader.layers[name].width[0] for name in self.penalty.names}
            tokens = inspect.signature(LocAteR).parameters["tokens"].default
            self.inputs = StepInputs(trainer, model, widths, tokens)
            self.inputs.install()

    def __call__(self) -> None:
        if self.inputs is not None:
            self.inputs.begin_batch()
        self.forward()
        settings = SETTINGS
        if self.inputs is not None:
            self.inputs.end_batch()
            inputs, error = self.inputs.pool()
            assert error is None
            settings = Settings("limit", "model", None, 1.0, None, LIMIT, inputs)
        self.penalty.add_gradient(settings, 0.1, self.parameters)

    def more(self, count: Callable[[Callable[[], object]], int]) -> int:
        """Than the forward alone, once places of weights are known."""
        self()
        return count(self) - count(self.forward)


@pytest.mark.parametrize("sizes", SIZES)
def test_products_of_weights(sizes: dict[str, int], tmp_path: Path) -> None:
    model = llama(sizes)
    own, reader = widths(model, tmp_path), ProjectionReader(model)
    assert own.parameters == own.active == sum(parameter.numel() for parameter in model.parameters())
    metric = QKSpectrum({name: layer.heads for name, layer in reader.layers.items()})
    told = cost.spectrum(own, cost.Job())
    assert flops(lambda: metric.update(reader)) == told.flops
    counted = calls(lambda: (metric.update(reader), metric.compute()))
    assert 0.9 * told.launches <= counted <= 1.1 * told.launches


@pytest.mark.parametrize("form", cost.FORMS)
@pytest.mark.parametrize("sizes", SIZES)
def test_products_of_the_penalty(sizes: dict[str, int], form: str, tmp_path: Path) -> None:
    model = llama(sizes)
    told, step = cost.FORMS[form](widths(model, tmp_path), cost.Job()), Step(model, form)
    assert step.more(flops) == told.flops
    assert 0.7 * told.launches <= step.more(calls) <= told.launches


@pytest.mark.parametrize("form", cost.FORMS)
def test_layers_that_are_gathered_one_by_one(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(SIZES[0] | {"num_hidden_layers": 1})
    told = cost.FORMS[form](widths(model, tmp_path), cost.Job(sharded=True))
    for stacker in (stacks.Stacker, latents.LatentStacker):
        monkeypatch.setattr(stacker, "stacks", lambda _, layers, names: ([], list(names)))
    monkeypatch.setattr(LayerReader, "gradient_view", lambda *_: None)
    # Of sharded layers, as of those with biases or norms, the limit form makes queries and keys.
    monkeypatch.setattr(locater, "takes_vectors", lambda _: True)
    step = Step(model, form)
    assert step.more(flops) == told.flops
    assert 0.7 * told.launches <= step.more(calls) <= told.launches


def test_the_form_of_the_callback_is_what_is_told() -> None:
    assert LocAteR().form == next(iter(cost.FORMS)) == "limit"
    assert LocAteR(0.1).form == "variance"
    assert LocAteR().tokens == cost.STEP_TOKENS


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("batch", "length"), [(2, 128), (9, 96)])
def test_products_of_activations(sizes: dict[str, int], batch: int, length: int, tmp_path: Path) -> None:
    own, job = widths(llama(sizes), tmp_path), cost.Job(batch=batch, length=length)
    query = torch.randn(batch, own.heads, length, own.d_head)
    key = torch.randn(batch, own.kv_heads, length, own.d_head)
    logits = AttentionLogits.of(query, key, is_causal=True)
    told = cost.attention(own, job)
    assert own.layers * flops(lambda: attention_sums(logits, rows=cost.ROWS)) == told.flops
    # Small layers are measured together.
    alone = calls(lambda: attention_sums(logits, rows=cost.ROWS))
    assert 0.8 * told.launches <= alone + 12 * own.layers <= 1.2 * told.launches
    states = torch.randn(min(batch, cost.SEQUENCES), length, own.d_model)
    told = cost.hidden(own, job)
    assert (own.layers + 1) * flops(lambda: hidden_sums(states, tokens=cost.TOKENS)) == told.flops
    alone = calls(lambda: hidden_sums(states, tokens=cost.TOKENS))
    assert 0.8 * told.launches <= alone + 8 * (own.layers + 1) <= 1.2 * told.launches


def test_traffic_is_that_of_the_metrics(tmp_path: Path) -> None:
    own, two = widths(llama(SIZES[0]), tmp_path), cost.Job(ranks=2)
    heads = {f"layer_{index}": own.heads for index in range(own.layers)}

    def states(metric: Any) -> int:
        # Maxima travel with flags, in float64.
        return sum(
            getattr(metric, name).nbytes * (2 if kind.__name__ == "dim_zero_max" else 1)
            for name, kind in metric._reductions.items()
        )

    # A ring of two sends as much as it reduces.
    assert cost.attention(own, two).network == states(AttentionStatistics(heads))
    blocks = dict.fromkeys(["embedding", *heads], 1)
    assert cost.hidden(own, two).network == states(HiddenStatistics(blocks))
    late = 2 * 2 * own.layers * own.heads * 8  # two statistics in float64, and which are known
    assert cost.spectrum(own, two).network == QKSpectrum(heads).total.nbytes + late
    assert all(
        of(own, cost.Job()).network == of(own, cost.Job()).collectives == 0 for of in cost.CALLBACKS.values()
    )
    gathered = own.layers * (own.heads + own.kv_heads) * own.d_head * own.d_model * 2
    four = cost.Job(ranks=4, sharded=True)
    assert cost.locater_variance(own, four).network == gathered * 3 // 4 + 36
    step = Step(llama(SIZES[0]), "limit", ranks=4)
    step()
    assert step.inputs is not None
    sent = sum(part.nbytes for part in step.inputs._table(step.penalty.names, own.d_model))
    assert cost.locater(own, four).network == gathered * 3 // 4 + 36 + 3 * sent


def test_experts_are_counted_as_far_as_a_token_meets_them(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        **SIZES[0], intermediate_size=16, vocab_size=16, num_local_experts=8, num_experts_per_tok=2
    )
    config.save_pretrained(tmp_path)
    own = cost.read_widths(tmp_path)
    assert own.parameters - own.active == 2 * 6 * 3 * 16 * 32


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(SIZES[0]).config.save_pretrained(tmp_path)
    assert main(["cost", "--model", str(tmp_path), "--ranks", "8", "--every", "10", "--length", "64"]) == 0
    shown = capsys.readouterr().out
    own, job = cost.read_widths(tmp_path), cost.Job(ranks=8, length=64)
    row = next(line for line in shown.splitlines() if line.startswith("QKSpectrumMonitor"))
    assert row.split()[2] == f"{cost.spectrum(own, job).flops / 1000:.3g}k"
    average = (
        cost.locater(own, job).launches
        + sum(of(own, job).launches for of in (cost.spectrum, cost.attention, cost.hidden)) / 10
    )
    row = next(line for line in shown.splitlines() if line.startswith("all, a step"))
    assert row.split()[-5] == f"{round(average):,}"
    assert max(map(len, shown.splitlines())) <= 80
    assert "LocAteR(),\n" in shown
    assert main(["cost", "--model", str(tmp_path), "--locater", "variance"]) == 0
    other = capsys.readouterr().out
    assert "LocAteR(weight),\n" in other
    assert other.splitlines()[4] != shown.splitlines()[4]


LONG = json.dumps({"model_type": "llama", "num_hidden_layers": 10**7})


@pytest.mark.parametrize(
    "text", ["", "[]", '{"model_type": "no such model"}', json.dumps({"layers": 3}), LONG]
)
def test_what_is_no_config(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert main(["cost", "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("lightning-qk: error: expected ")
    assert main(["cost", "--model", str(tmp_path), "--ranks", "0"]) == 2
    assert "--ranks" in capsys.readouterr().err
