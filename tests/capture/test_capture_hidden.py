"""Hidden states and masks as blocks and models get them, eager, compiled and checkpointed."""

import copy

import models
import pytest
import torch
import torch._dynamo
import transformers
from torch import nn

from lightning_qk.capture.hidden import HiddenCapture
from lightning_qk.heads.sites import find_blocks


class Probe:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: dict[str, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}
        blocks, _ = find_blocks(model)
        self.capture = HiddenCapture(
            {block.module: name for name, block in blocks.items()},
            self.listen,
            inputs={block.module: f"{name} input" for name, block in blocks.items() if block.is_first},
            models={block.module: block.models for block in blocks.values()},
            turned={block.module: block.is_turned for block in blocks.values()},
            model=model,
        )
        self.capture.install()

    def listen(self, name, states, mask):
        copied = None if mask is None else mask.clone()
        self.found.setdefault(name, []).append((states.clone(), copied))

    def run(self, *args, listen=True, call=None, **kwargs):
        self.capture.enabled = listen
        out = (call or self.model)(*args, **kwargs)
        self.capture.enabled = False
        return out


@pytest.fixture
def tokens():
    return torch.randint(3, models.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))


MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("make", [models.gpt2, models.bert, models.llama])
def test_states_are_the_models_own(make, tokens):
    model = make().eval()
    probe = Probe(model)
    out = probe.run(input_ids=tokens, attention_mask=MASK, output_hidden_states=True)
    embedding, *states = out.hidden_states
    names = [name for name in probe.found if not name.endswith("input")]
    assert len(names) == 2
    (before, mask) = probe.found[f"{names[0]} input"][0]
    torch.testing.assert_close(before, embedding)
    assert torch.equal(mask, MASK.bool())
    # The last of a model's own list may have the final norm behind it.
    torch.testing.assert_close(probe.found[names[0]][0][0], states[0])
    if make is models.bert:
        torch.testing.assert_close(probe.found[names[1]][0][0], states[1])
    assert probe.capture.seen == set(probe.found)
    assert probe.capture.problems == {}
    assert probe.capture.unmasked == set()
    probe.capture.remove()
    # The model has hooks of its own for what it was asked for.
    for module in model.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        assert "lightning_qk" not in repr([(getattr(hook, "__module__", ""), hook) for hook in hooks])
    assert not [name for module in model.modules() for name in vars(module) if "lightning_qk" in name]


def test_nothing_is_heard_unless_asked(tokens):
    probe = Probe(models.gpt2())
    probe.run(input_ids=tokens, listen=False)
    assert probe.found == {}
    copied = copy.deepcopy(probe.model)
    probe.run(input_ids=tokens, call=copied)
    assert probe.found == {}
    probe.capture.remove()
    probe.run(input_ids=tokens)
    assert probe.found == {}


def test_two_captures_of_one_model(tokens):
    one = Probe(models.gpt2())
    other = Probe(one.model)
    one.run(input_ids=tokens)
    assert [len(value) for value in one.found.values()] == [1] * 3
    assert other.found == {}
    one.capture.remove()
    other.run(input_ids=tokens)
    assert [len(value) for value in other.found.values()] == [1] * 3
    other.capture.remove()


def test_each_stack_has_its_own_mask(tokens):
    probe = Probe(models.t5().eval())
    target = tokens[:, :7].flip(1)
    decoder_mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    probe.run(
        input_ids=tokens,
        attention_mask=MASK,
        decoder_input_ids=target,
        decoder_attention_mask=decoder_mask,
    )
    for name, calls in probe.found.items():
        want = MASK if name.startswith("encoder") else decoder_mask
        assert torch.equal(calls[0][1], want.bool()), name
    # No mask for the decoder: that of the encoder is not taken for it.
    probe.found.clear()
    probe.run(input_ids=tokens, attention_mask=MASK, decoder_input_ids=target)
    assert probe.found["decoder.block.0"][0][1] is None
    assert probe.capture.unmasked == set()
    # Nor is one of a batch before.
    probe.found.clear()
    probe.run(input_ids=tokens, decoder_input_ids=target)
    assert probe.found["encoder.block.1"][0][1] is None
    probe.capture.remove()


def test_a_mask_that_does_not_tell_is_named(tokens):
    probe = Probe(models.bert().eval())
    probe.run(input_ids=tokens, attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.bool))
    assert all(calls[0][1] is None for calls in probe.found.values())
    assert probe.capture.unmasked == set(probe.found)
    probe.capture.remove()


def test_a_shared_block_is_heard_as_often_as_it_runs_and_its_first_input_once(tokens):
    config = transformers.AlbertConfig(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=16,
        num_hidden_layers=3,
        vocab_size=models.VOCABULARY,
        embedding_size=8,
    )
    probe = Probe(transformers.AlbertModel(config).eval())
    for _ in range(2):
        probe.run(input_ids=tokens, attention_mask=MASK)
    (name,) = (name for name in probe.found if not name.endswith("input"))
    assert len(probe.found[name]) == 2 * 3
    assert len(probe.found[f"{name} input"]) == 2
    probe.capture.remove()


def test_tokens_before_the_batch_are_turned(tokens):
    config = transformers.XLNetConfig(
        vocab_size=models.VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=16
    )
    probe = Probe(transformers.XLNetModel(config).eval())
    for mask in (MASK, None):
        probe.found.clear()
        probe.run(input_ids=tokens, attention_mask=mask)
        assert probe.found
        for states, own in probe.found["layer.1"]:
            assert states.shape == (2, 7, 16)
            assert own is None if mask is None else torch.equal(own, mask.bool())
    probe.capture.remove()


def test_what_cannot_be_used_is_a_problem_and_the_model_runs_on(tokens):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Identity()])

        def forward(self, x):
            return self.layers[0](x)

    model = Odd()
    capture = HiddenCapture({model.layers[0]: "block"}, lambda *_: 1 / 0)
    capture.install()
    capture.enabled = True
    model(torch.zeros(2, 3))
    assert "not floating (batch, tokens, width)" in capture.problems.pop("block")
    model(torch.zeros(2, 3, 4))
    assert "ZeroDivisionError" in capture.problems["block"]
    assert model({"a": 1}) == {"a": 1}
    capture.problems.clear()
    model({"a": 1})
    assert "no tensor of hidden states" in capture.problems["block"]
    capture.remove()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_is_heard_once(use_reentrant, tokens):
    model = models.llama().train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    probe = Probe(model)
    probe.capture.enabled = True
    model(input_ids=tokens, attention_mask=MASK).logits.sum().backward()
    probe.capture.remove()
    assert [len(calls) for calls in probe.found.values()] == [1] * 3


@pytest.mark.parametrize(
    ("mode", "before", "use_reentrant"),
    [
        pytest.param("whole", True, None, marks=pytest.mark.slow),
        ("whole", False, False),
        ("regional", True, None),
        ("regional", False, True),
    ],
)
def test_compiled_models_are_heard_and_left_alone(mode, before, use_reentrant, tokens):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = models.llama().train()
    model.config.use_cache = False
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    eager = Probe(model)
    eager.run(input_ids=tokens, attention_mask=MASK)
    eager.capture.remove()

    def step(run, probe, listen):
        model.zero_grad()
        if probe is not None:
            probe.capture.enabled = listen
        run(input_ids=tokens, attention_mask=MASK).logits.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    def compiled():
        if mode == "whole":
            return torch.compile(model, backend="aot_eager", fullgraph=True)
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        return model

    if before:
        run = compiled()
        plain = step(run, None, False)
        probe = Probe(model)
    else:
        probe = Probe(model)
        run = compiled()
        plain = step(run, probe, False)
    for listen in (True, False, True):
        got = step(run, probe, listen)
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    probe.capture.remove()
    assert probe.capture.problems == {}
    assert set(probe.found) == set(eager.found)
    for name, calls in probe.found.items():
        assert len(calls) == 2, name
        for states, mask in calls:
            torch.testing.assert_close(states, eager.found[name][0][0], rtol=1e-5, atol=1e-5)
            assert torch.equal(mask, MASK.bool())
    torch._dynamo.reset()


class Turning(nn.Module):
    """A block of (batch, tokens, width) whose attention has the tokens first."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x):
        turned = x.transpose(0, 1)
        return x + self.attention(turned, turned, turned)[0].transpose(0, 1)


def torch_encoder(*, batch_first, train):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
    # What takes padding out in evaluation is tried with tokens on the second axis alone.
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).train(train)


def encoder_batch(*, padded):
    torch.manual_seed(0)
    x, keep = torch.randn(3, 5, 16), torch.ones(3, 5, dtype=torch.bool)
    if padded:
        keep[0, 3:] = keep[2, 4:] = False
    return x, keep


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_encoders_have_their_axes_and_their_padding(batch_first, train, padded):
    x, keep = encoder_batch(padded=padded)
    model, probe_model = (torch_encoder(batch_first=batch_first, train=train) for _ in range(2))
    probe_model.load_state_dict(model.state_dict())
    given = {"src_key_padding_mask": ~keep} if padded else {}
    entered = x if batch_first else x.transpose(0, 1)
    with torch.no_grad():
        want = model(entered, **given)
        probe = Probe(probe_model)
        assert torch.equal(probe.run(entered, **given), want)
    want = want if batch_first else want.transpose(0, 1)
    (before, _), (after, mask) = probe.found["layers.0 input"][0], probe.found["layers.1"][0]
    torch.testing.assert_close(before[keep], x[keep])
    torch.testing.assert_close(after[keep], want[keep])
    assert torch.equal(keep, torch.ones_like(keep) if mask is None else mask)
    assert probe.capture.problems == {}
    assert probe.capture.unmasked == set()


def test_a_block_that_may_turn_its_tokens_is_left_out():
    probe = Probe(nn.Sequential(Turning(), Turning()))
    probe.run(torch.randn(2, 5, 16))
    assert probe.found == {}
    assert all("pass batch_first=True" in why for why in probe.capture.problems.values())


def test_a_mask_of_another_form_is_not_known_though_torchs_layer_has_none():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch_encoder(batch_first=True, train=True)

        def forward(self, x, attention_mask):
            return self.encoder(x, mask=attention_mask)

    model = Model()
    blocks, _ = find_blocks(model)
    probe = Probe(model)
    probe.capture.remove()
    probe.capture = HiddenCapture(
        {block.module: name for name, block in blocks.items()},
        probe.listen,
        models={block.module: (*block.models, model) for block in blocks.values()},
    )
    probe.capture.install()
    x, _ = encoder_batch(padded=False)
    probe.run(x, torch.zeros(5, 5))
    assert probe.capture.unmasked == set(blocks)
    probe.capture.unmasked.clear()
    probe.run(x, torch.zeros(6, 5, 5))
    assert probe.capture.unmasked == set(blocks)
