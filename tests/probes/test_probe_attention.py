"""Streamed probabilities of captured calls against the models' own eager maps."""

import models
import pytest
import torch
import transformers

from lightning_qk.architecture.dry_run import evaluated
from lightning_qk.functional import logits as module
from lightning_qk.metrics.collector import AttentionCollector
from lightning_qk.probes._attention import (
    attention_of,
    entropy,
    is_causal,
    received,
    row_parts,
    rows_at,
    weighted_values,
)
from lightning_qk.probes.run import prepared


def bloom(**kwargs):
    """Multiplies and takes the softmax itself."""
    config = transformers.BloomConfig(
        hidden_size=32, n_layer=2, n_head=4, vocab_size=models.VOCABULARY, pad_token_id=0
    )
    return models.build(transformers.BloomForCausalLM, config, **kwargs)


MODELS = {
    "gpt2": models.gpt2,
    "bert": models.bert,
    "llama": models.llama,
    "mistral": models.mistral,
    "gpt_oss": models.gpt_oss,
    "gemma2": models.gemma2,
    "bloom": bloom,
}
PADDED = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])


def batch(padded: bool = True) -> dict:
    ids = torch.randint(3, models.VOCABULARY, (2, 12))
    return {"input_ids": ids, "attention_mask": PADDED} if padded else {"input_ids": ids}


def maps(model, given) -> list[torch.Tensor]:
    """``(batch, heads, n, n)`` of each layer in float64; heads' learnt sinks take their share."""
    with torch.no_grad():
        out = model.eval()(**given, output_attentions=True).attentions
    return [each.double() for each in out]


def heard(model, given, function) -> list:
    found = []
    with evaluated(model):
        collector = AttentionCollector(model, eager=True)
        collector.run(prepared(model, given), lambda name, call: found.append(function(attention_of(call))))
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_probabilities_are_the_models(kind, padded, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * 2 * 4 * 12)  # five rows at a time
    model, given = MODELS[kind](attn_implementation="eager").eval(), batch(padded)
    valid = given.get("attention_mask", torch.ones(2, 12)).bool()

    def whole(attention):
        out = torch.zeros(attention.shape)
        shown = torch.zeros(attention.shape, dtype=torch.bool)
        for part in row_parts(attention):
            out[:, :, part.rows, : part.probabilities.shape[-1]] = part.probabilities
            shown[:, :, part.rows, : part.shown.shape[-1]] = part.shown
        return out, shown, received(attention), received(attention, ~valid.bool() | (torch.arange(12) == 8))

    found = heard(model, given, whole)
    assert len(found) == 2
    for (out, shown, all_rows, one_row), want in zip(found, maps(model, given), strict=True):
        want = want * valid[:, None, :, None]
        torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
        seen = (want > 0).sum(-2)
        assert (shown >= (want > 1e-30)).all()
        assert not shown[~valid[:, None].expand(-1, 4, -1)].any()
        mean = want.sum(-2) / seen
        torch.testing.assert_close(all_rows.double(), mean, atol=2e-6, rtol=1e-4, equal_nan=True)
        alone = want[:, :, 8].where(want[:, :, 8] > 0, torch.nan)  # keys that one row sees
        torch.testing.assert_close(one_row.double(), alone, atol=2e-6, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", MODELS)
def test_rows_and_their_entropy(kind):
    model, given = MODELS[kind](attn_implementation="eager").eval(), batch()
    index = torch.tensor([[3, 11], [8, 0]])
    found = heard(model, given, lambda attention: rows_at(attention, index))
    for rows, want in zip(found, maps(model, given), strict=True):
        want = torch.stack([each[:, places] for each, places in zip(want, index, strict=True)])
        torch.testing.assert_close(rows.double(), want, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(
            entropy(rows).double(), -(want * want.clamp_min(1e-300).log()).sum(-1), atol=1e-4, rtol=1e-5
        )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_outputs_are_what_the_output_projection_gets(kind):
    """Values of groups, too."""
    model, given = MODELS[kind](), batch()
    got = {}
    layers = [each.attn if kind == "gpt2" else each.self_attn for each in layers_of(model)]
    for number, layer in enumerate(layers):
        projection = layer.c_proj if kind == "gpt2" else layer.o_proj
        projection.register_forward_pre_hook(lambda _, args, number=number: got.update({number: args[0]}))
    index = torch.arange(12)[None].expand(2, -1)
    found = heard(model, given, lambda a: weighted_values(rows_at(a, index), a.value))
    for number, out in enumerate(found):
        want = got[number].detach()
        valid = PADDED.bool()
        torch.testing.assert_close(out.transpose(1, 2).flatten(2)[valid], want[valid], atol=1e-5, rtol=1e-4)


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_who_sees_ahead(kind, implementation, padded):
    if implementation == "sdpa" and kind in ("bloom", "gpt_oss"):
        pytest.skip("eager alone")
    model = MODELS[kind](attn_implementation=implementation)
    assert heard(model, batch(padded), is_causal) == [kind != "bert"] * 2
