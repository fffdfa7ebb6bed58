"""Captured attention against the model's own softmax, and the model left bit-identical."""

import models
import pytest
import torch
from call_oracle import eager_maps, map_statistics, measure
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from lightning_qk.capture.capture import AttentionCapture
from lightning_qk.heads.reader import find_attention, head_projections

PADDING = torch.ones(2, 12, dtype=torch.long)
PADDING[1, :4] = 0
RIGHT = torch.ones(2, 12, dtype=torch.long)
RIGHT[1, -4:] = 0


def batch() -> torch.Tensor:
    return torch.randint(3, models.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def capture(model: nn.Module, **inputs: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    got, problems = measure(model, **inputs)
    assert problems == {}
    assert set(got) == set(head_projections(model))
    return got


CASES = {
    "gpt2": (models.gpt2, "sdpa"),
    "gpt2 eager": (models.gpt2, "eager"),
    "bert": (models.bert, "sdpa"),
    "bert eager": (models.bert, "eager"),
    "llama": (models.llama, "sdpa"),
    "llama eager": (models.llama, "eager"),
    "mistral": (models.mistral, "sdpa"),
    "mistral eager": (models.mistral, "eager"),
    "gpt_oss eager": (models.gpt_oss, "eager"),
    "gemma2 eager": (models.gemma2, "eager"),
    "t5": (models.t5, "sdpa"),
    "t5 eager": (models.t5, "eager"),
}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_the_models_own_attention(case, padding):
    kind, implementation = CASES[case]
    model = kind(attn_implementation=implementation).eval()
    inputs = {"input_ids": batch()}
    keep = torch.ones(2, 12, dtype=torch.bool)
    if padding is not None:
        inputs["attention_mask"] = PADDING if padding == "left" else RIGHT
        keep = inputs["attention_mask"].bool()
    if "t5" in case:
        inputs["decoder_input_ids"] = batch()[:, :9]
    with torch.no_grad():
        got = capture(model, **inputs)
        maps = eager_maps(model, **inputs)
    assert list(maps) == list(got) or set(maps) == set(got)
    for name, p in maps.items():
        rows = keep if p.shape[2] == 12 else torch.ones(2, 9, dtype=torch.bool)
        for statistic, want in map_statistics(p, rows, sink="gpt_oss" in case).items():
            if statistic == "distance" and "EncDec" in name and not model._supports_sdpa:
                # A layer that takes the softmax itself: its logits give queries no place among other tokens.
                assert got[name][statistic].isnan().all()
                continue
            value = got[name][statistic].double()
            torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-4, msg=f"{name} {statistic}")


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_bit_identical_in_training_with_dropout(case):
    kind, implementation = CASES[case]
    model = kind(attn_implementation=implementation).train()
    inputs = {"input_ids": batch(), "labels": batch(), "attention_mask": PADDING}

    def run(listen: bool):
        model.zero_grad()
        torch.manual_seed(7)
        heard = []
        listening = AttentionCapture(
            {m: n for n, m in find_attention(model).items()}, lambda name, call: heard.append(call)
        )
        if listen:
            listening.install()
            listening.enabled = True
        output = model(**inputs)
        output.loss.backward()
        listening.remove()
        assert bool(heard) == listen
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return output.logits, output.loss, gradients

    logits, loss, gradients = run(listen=False)
    logits_heard, loss_heard, gradients_heard = run(listen=True)
    assert torch.equal(logits, logits_heard)
    assert torch.equal(loss, loss_heard)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_heard, strict=True))


def test_dropout_is_not_part_of_the_statistics():
    model = models.gpt2().train()
    model.config.attn_pdrop = 0.9
    for module in find_attention(model).values():
        module.attn_dropout.p = 0.9
    model.transformer.drop.p = 0.0
    training = capture(model, input_ids=batch())
    # The first layer sees the same hidden states in both modes.
    name = next(iter(training))
    torch.testing.assert_close(
        training[name]["entropy"], capture(model.eval(), input_ids=batch())[name]["entropy"]
    )


def test_the_interface_is_left_as_it_was():
    before = AttentionInterface.get_interface, dict(vars(AttentionInterface))
    model = models.gpt2()
    one, two = (
        AttentionCapture({m: n for n, m in find_attention(model).items()}, lambda *_: None) for _ in "ab"
    )
    one.install()
    two.install()
    one.install()
    one.remove()
    assert AttentionInterface.get_interface is not before[0]
    two.remove()
    two.remove()
    assert AttentionInterface.get_interface is before[0]
    assert set(vars(AttentionInterface)) == set(before[1])
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__name__ == "sdpa_attention_forward"
    assert not hasattr(ALL_ATTENTION_FUNCTIONS["sdpa"], "_lightning_qk_tap")


def test_two_models_do_not_hear_each_other():
    first, second = models.gpt2(), models.gpt2()
    heard = {"first": 0, "second": 0}

    def count(which):
        def listen(name, call):
            heard[which] += 1

        return listen

    captures = [
        AttentionCapture({m: n for n, m in find_attention(model).items()}, count(which))
        for which, model in (("first", first), ("second", second))
    ]
    for listening in captures:
        listening.install()
        listening.enabled = True
    first(input_ids=batch())
    captures[0].enabled = False
    first(input_ids=batch())
    second(input_ids=batch())
    for listening in captures:
        listening.remove()
    assert heard == {"first": 2, "second": 2}


def test_gradient_checkpointing_counts_once():
    for reentrant in (True, False):
        model = models.gpt2().train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls = []
        listening = AttentionCapture(
            {m: n for n, m in find_attention(model).items()},
            lambda name, call, calls=calls: calls.append(name),
        )
        listening.install()
        listening.enabled = True
        embeddings = model.transformer.wte(batch()).detach().requires_grad_()
        model(inputs_embeds=embeddings, labels=batch()).loss.backward()
        listening.remove()
        assert len(calls) == 2


def test_a_listener_that_fails_does_not_harm_the_model():
    model = models.gpt2().eval()
    want = model(input_ids=batch()).logits

    def fail(name, call):
        raise RuntimeError("out of ideas")

    listening = AttentionCapture({m: n for n, m in find_attention(model).items()}, fail)
    listening.install()
    listening.enabled = True
    try:
        assert torch.equal(model(input_ids=batch()).logits, want)
    finally:
        listening.remove()
    assert len(listening.problems) == 2
    assert "out of ideas" in next(iter(listening.problems.values()))


def test_an_implementation_that_changes_its_name_is_named_once():
    model = models.gpt2(attn_implementation="eager")
    heard = []
    listening = AttentionCapture(
        {m: n for n, m in find_attention(model).items()}, lambda name, call: heard.append(name), model=model
    )
    listening.install()
    listening.enabled = True
    model(input_ids=batch())
    model.set_attn_implementation("sdpa")
    model(input_ids=batch())
    model.set_attn_implementation("eager")
    model(input_ids=batch())
    listening.remove()
    assert len(heard) == 2
    assert set(listening.problems) == set(find_attention(model))
    assert "changed from 'eager' to 'sdpa'" in next(iter(listening.problems.values()))


def test_nothing_stands_between_a_model_and_its_function_while_nobody_listens():
    model = models.gpt2()
    listening = AttentionCapture({m: n for n, m in find_attention(model).items()}, lambda *_: None)
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    listening.install()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain
    assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is plain
    listening.enabled = True
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not plain
    listening.remove()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain
