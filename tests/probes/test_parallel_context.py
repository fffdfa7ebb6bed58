"""Parallel-context entropy against parts that are really encoded apart and cached."""

import models
import pytest
import torch
import transformers
from transformers import DynamicCache

from lightning_qk.probes import parallel_context_entropy

IDS = torch.randint(3, models.VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(1))


def cut(count: int, parts: int) -> list[list[int]]:
    """Ranks of the context's tokens by part."""
    return [[rank for rank in range(count) if rank * parts // count == p] for p in range(parts)]


def apart(model, ids: torch.Tensor, parts: int, rows: int) -> torch.Tensor:
    """Entropy of the last rows of one sequence, ``(layers, heads)``; parts are runs of their own."""
    model = model.eval()
    context = ids[: len(ids) - rows]
    pieces = cut(len(context), parts)
    with torch.no_grad():
        runs = [model(input_ids=context[piece][None], use_cache=True) for piece in pieces]
        caches = [run.past_key_values for run in runs]
        whole = DynamicCache(config=model.config)
        for layer in range(2):
            keys = torch.cat([cache.layers[layer].keys for cache in caches], 2)
            values = torch.cat([cache.layers[layer].values for cache in caches], 2)
            whole.update(keys, values, layer)
        first = max(len(piece) for piece in pieces)
        out = model(
            input_ids=ids[-rows:][None],
            position_ids=torch.arange(first, first + rows)[None],
            past_key_values=whole,
            output_attentions=True,
        )
    return torch.stack([torch.special.entr(a.double()).sum(-1).mean(-1)[0] for a in out.attentions])


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("parts", "rows"), [(2, 1), (3, 2)])
def test_as_if_each_part_were_a_run_of_its_own(kind, parts, rows, side):
    model = getattr(models, kind)(attn_implementation="eager")
    kept = [slice(0, 14), {"left": slice(4, 14), "right": slice(0, 10), None: slice(0, 14)}[side]]
    given = {"input_ids": IDS}
    if side is not None:
        mask = torch.zeros(2, 14, dtype=torch.long)
        for row, places in zip(mask, kept, strict=True):
            row[places] = 1
        given["attention_mask"] = mask
    got = parallel_context_entropy(model, given, parts=parts, rows=rows)
    for values, count in ((got.whole, 1), (got.parts, parts)):
        runs = [apart(model, ids[places], count, rows) for ids, places in zip(IDS, kept, strict=True)]
        want = torch.stack(runs).mean(0)
        torch.testing.assert_close(torch.stack(list(values.values())).double(), want, atol=2e-4, rtol=1e-4)
    for name, ratio in got.ratio.items():
        torch.testing.assert_close(ratio, got.parts[name] / got.whole[name])


def test_one_part_is_the_whole_and_sdpa_is_eager():
    for kind in ("gpt2", "bert", "llama"):
        eager = getattr(models, kind)(attn_implementation="eager")
        got = parallel_context_entropy(eager, {"input_ids": IDS}, parts=1)
        for ratio in got.ratio.values():
            assert torch.equal(ratio, torch.ones(4))
        sdpa = getattr(models, kind)(attn_implementation="sdpa")
        sdpa.load_state_dict(eager.state_dict())
        for one, other in zip(
            parallel_context_entropy(eager, {"input_ids": IDS}).parts.values(),
            parallel_context_entropy(sdpa, {"input_ids": IDS}).parts.values(),
            strict=True,
        ):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_bidirectional_model_encodes_each_part_alone():
    model = models.bert(attn_implementation="eager").eval()
    keys = []
    projection = model.bert.encoder.layer[1].attention.self.key
    handle = projection.register_forward_hook(lambda _, args, out: keys.append(out))
    got = parallel_context_entropy(model, {"input_ids": IDS}, parts=3, rows=2)
    parts, keys = keys[-1], []
    handle.remove()
    projection.register_forward_hook(lambda _, args, out: keys.append(out))
    with torch.no_grad():
        for piece in cut(12, 3):
            model(input_ids=IDS[:, piece])
    torch.testing.assert_close(parts[:, :12], torch.cat(keys, 1), atol=1e-5, rtol=1e-4)
    assert (torch.stack(list(got.ratio.values())) != 1).all()


def test_parts_that_repeat_each_other_change_nothing_without_positions():
    model = models.bert(attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "position_embeddings" in name:
            parameter.data.zero_()
    twice = torch.cat([IDS[:, :6], IDS[:, :6], IDS[:, -1:]], 1)
    got = parallel_context_entropy(model, {"input_ids": twice}, parts=2)
    for name, whole in got.whole.items():
        torch.testing.assert_close(got.parts[name], whole, atol=1e-5, rtol=1e-5)


def test_positions_that_begin_behind_the_padding():
    config = transformers.RobertaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=models.VOCABULARY,
        max_position_embeddings=64,
        pad_token_id=1,
    )
    model = models.build(transformers.RobertaForMaskedLM, config, attn_implementation="eager").eval()
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    got = parallel_context_entropy(model, {"input_ids": IDS}, parts=2)
    assert (torch.stack(list(got.whole.values())) > 0).all()
    assert seen[-1]["position_ids"][0].tolist() == [*range(2, 9), *range(2, 8), 9]


def test_windows_refuse_what_they_do_not_see_and_take_what_they_do():
    model = models.mistral()
    with pytest.raises(ValueError, match=r"MistralForCausalLM to give its own output.*shorter sequences"):
        parallel_context_entropy(model, {"input_ids": IDS})
    parallel_context_entropy(model, {"input_ids": IDS[:, :5]}, parts=2)


def test_what_is_refused():
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=models.VOCABULARY)
    bloom = models.build(transformers.BloomForCausalLM, config)
    with pytest.raises(ValueError, match="BloomForCausalLM without position_ids"):
        parallel_context_entropy(bloom, {"input_ids": IDS})
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration.*pass its encoder"):
        parallel_context_entropy(models.t5(), {"input_ids": IDS})
    with pytest.raises(ValueError, match="LlamaForCausalLM in an attention implementation"):
        parallel_context_entropy(models.llama(attn_implementation="flex_attention"), {"input_ids": IDS})
    with pytest.raises(ValueError, match="at least 14 tokens of context"):
        parallel_context_entropy(models.gpt2(), {"input_ids": IDS}, parts=14)
    with pytest.raises(ValueError, match="parts and rows of at least 1"):
        parallel_context_entropy(models.gpt2(), {"input_ids": IDS}, parts=0)
