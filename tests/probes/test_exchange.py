"""Exchangeability: sets, the models' own maps and the outputs of their heads."""

import models
import pytest
import torch
import transformers

from lightning_qk.probes import exchangeability
from lightning_qk.probes.run import ProbeWarning

IDS = torch.randint(3, models.VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])


def without_positions(model):
    """Every token's hidden state is that of its word alone."""
    for name, parameter in model.named_parameters():
        if "position_embeddings" in name or "wpe" in name:
            parameter.data.zero_()
    return model


@pytest.mark.parametrize("of", ["output", "attention"])
def test_a_set_is_a_set(of):
    """A bidirectional network without positions in every layer, a causal one in its first."""
    given = {"input_ids": IDS, "attention_mask": MASK}
    for model, layers in ((models.bert(), 2), (models.gpt2(), 1)):
        ordered = torch.stack(list(exchangeability(model, given, of=of).values()))
        assert (ordered > 1e-2).all()
        changes = torch.stack(list(exchangeability(without_positions(model), given, of=of).values()))
        assert (changes[:layers] < 1e-5).all()
        assert (changes[layers:] > 1e-2).all()


def permuted(source: torch.Tensor) -> torch.Tensor:
    return IDS.gather(1, source)


def test_outputs_and_maps_by_brute_force(monkeypatch):
    """One permutation, the same for the test and the probe."""
    source = torch.tensor([[3, 0, 1, 2, 5, 4, 6, 8, 7, 9], [0, 1, 2, 5, 3, 4, 8, 7, 6, 9]])
    monkeypatch.setattr("lightning_qk.probes.exchange._permutation", lambda movable, _: source)
    model = models.llama(attn_implementation="eager").eval()
    given = {"input_ids": IDS, "attention_mask": MASK}
    outputs: list = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0].double()))
    with torch.no_grad():
        runs = [
            model(**given | {"input_ids": ids}, output_attentions=True) for ids in (IDS, permuted(source))
        ]
    before, after = outputs[:2], outputs[2:4]
    got = torch.stack(list(exchangeability(model, given, permutations=1).values()))
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        old, new = (each[:, -1].unflatten(-1, (4, 8)) for each in (old, new))
        want = ((new - old).norm(dim=-1) / old.norm(dim=-1)).mean(0)
        torch.testing.assert_close(got[layer], want.float(), atol=1e-5, rtol=1e-4)
    got = torch.stack(list(exchangeability(model, given, permutations=1, of="attention", rows=2).values()))
    for layer in range(2):
        old, new = (run.attentions[layer][:, :, -2:].double() for run in runs)
        want = torch.zeros(2, 4, 2)
        for b in range(2):
            for place, token in enumerate(source[b].tolist()):
                want[b] += (new[b, :, :, place] - old[b, :, :, token]).abs() / 2
        torch.testing.assert_close(got[layer], want.mean((0, 2)).float(), atol=1e-5, rtol=1e-4)


def test_who_asks_who_is_kept_and_padding_stay(monkeypatch):
    seen = []
    model = models.bert()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    keep = torch.zeros(2, 10, dtype=torch.bool)
    keep[:, 4] = True
    kinds = torch.arange(10).repeat(2, 1) % 2
    exchangeability(
        model, {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": kinds}, rows=2, keep=keep
    )
    first, *rest = seen
    assert torch.equal(first, IDS)
    for ids in rest:
        assert torch.equal(ids[:, [4, 8, 9]], IDS[:, [4, 8, 9]])
        assert torch.equal(ids[1, :3], IDS[1, :3])
        assert torch.equal(ids.sort().values, IDS.sort().values)
    assert len({tuple(ids.flatten().tolist()) for ids in rest}) == 4
    stuck = exchangeability(model, {"input_ids": IDS}, keep=torch.ones(2, 10, dtype=torch.bool))
    assert all(change.isnan().all() for change in stuck.values())


def test_layers_of_which_only_the_softmax_is_known():
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=models.VOCABULARY)
    model = models.build(transformers.BloomForCausalLM, config)
    with pytest.raises(ValueError, match=r"layers of BloomForCausalLM.*ask for of='attention'"):
        exchangeability(model, {"input_ids": IDS})
    assert len(exchangeability(model, {"input_ids": IDS}, of="attention")) == 2


def test_layers_that_are_left_out_are_named():
    model = models.bert()
    model.eval()
    layer = model.bert.encoder.layer[1]
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.warns(ProbeWarning, match=r"layer\.1\.attention\.self left out: no attention call"):
        out = exchangeability(model, {"input_ids": IDS})
    assert list(out) == ["bert.encoder.layer.0.attention.self"]


def test_bad_arguments():
    for arguments in ({"permutations": 0}, {"rows": 0}, {"of": "values"}):
        with pytest.raises(ValueError, match="expected"):
            exchangeability(models.bert(), {"input_ids": IDS}, **arguments)
