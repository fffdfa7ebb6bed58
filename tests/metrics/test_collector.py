"""The loop that measures attention calls: what is captured, pooled and left out."""

import models
import pytest
import torch
import transformers

from lightning_qk.capture.call import UnsupportedCallError
from lightning_qk.functional.attention import attention_sums, finish
from lightning_qk.metrics import AttentionCollector, AttentionStatistics, Maxima, SumAccumulator
from lightning_qk.metrics.collector import LayerFacts


def ids(length=12, sequences=2):
    return {"input_ids": torch.randint(3, models.VOCABULARY, (sequences, length))}


def sums(name, call):
    return attention_sums(call.logits())


def test_pools_over_batches_like_one_batch():
    """The heads' means over two runs are those over the rows of both."""
    model, batches = models.gpt2().eval(), [ids(), ids(8)]
    collector = AttentionCollector(model, sums)
    for batch in batches:
        collector.run(batch)
    metric = AttentionStatistics(collector.heads)
    collector.pool.into(metric)
    values = metric.compute()
    eager = models.gpt2(attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    rows = []
    for batch in batches:
        maps = eager(**batch, output_attentions=True).attentions
        rows.append(torch.cat([p.detach().amax(-1).transpose(0, 1).flatten(1) for p in maps]))
    torch.testing.assert_close(values["max_prob"], torch.cat(rows, 1).mean(1), rtol=1e-5, atol=1e-6)


def test_leaves_out_what_is_asked():
    config = transformers.T5Config(
        d_model=32, d_kv=8, num_heads=4, num_layers=1, vocab_size=models.VOCABULARY, d_ff=32
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = ids() | {"decoder_input_ids": ids(5)["input_ids"]}
    named = {}
    for cross_attention in (True, False):
        collector = AttentionCollector(model, sums, cross_attention=cross_attention)
        with collector:
            model(**batch)
        named[cross_attention] = set(collector.pool.names)
        assert not collector.left_out
    cross = {name for name, own in collector.self_attention.items() if not own}
    assert len(cross) == 1
    assert named[True] - named[False] == cross


def test_positions_are_blank_in_cross_attention():
    config = transformers.T5Config(
        d_model=32, d_kv=8, num_heads=4, num_layers=1, vocab_size=models.VOCABULARY, d_ff=32
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    collector = AttentionCollector(model, sums)
    collector.run(ids() | {"decoder_input_ids": ids(5)["input_ids"]})
    metric = AttentionStatistics(collector.heads)
    collector.pool.into(metric)
    values = metric.compute()
    collector.blank_positions(metric, values)
    for name, part in metric.split(values["distance"]).items():
        assert bool(part.isnan().all()) == (not collector.self_attention[name])
    assert values["entropy"].isfinite().all()


def test_cached_calls():
    model = models.gpt2().eval()
    counts = {}
    for cached_calls in (True, False):
        collector = AttentionCollector(model, sums, cached_calls=cached_calls)
        with collector, torch.no_grad():
            first = model(**ids(), use_cache=True)
            model(**ids(1), past_key_values=first.past_key_values)
            model.generate(**ids(4), max_new_tokens=2, do_sample=False, pad_token_id=0)
        weights = [own.weight.amax() for own in collector.pool.sums().values()]
        counts[cached_calls] = {int(weight) for weight in weights}
        assert collector.cached == (set() if cached_calls else set(collector.modules))
        assert collector.pool.left_out_calls == collector.cached
    assert counts[False] == {2 * 12}
    assert min(counts[True]) > 2 * 12


def test_errors():
    """What cannot be read is left out for good; what fails once is lost once, where that is asked for."""
    model = models.gpt2().eval()

    def unsupported(name, call):
        raise UnsupportedCallError("no")

    def failing(name, call):
        raise RuntimeError("out of memory")

    for measure, retry, is_left_out in (
        (unsupported, True, True),
        (failing, False, True),
        (failing, True, False),
    ):
        collector = AttentionCollector(model, measure, retry=retry)
        collector.run(ids())
        assert collector.left_out.keys() == (set(collector.modules) if is_left_out else set())
        assert collector.pool.lost.keys() == (set() if is_left_out else set(collector.modules))
    collector.pool = SumAccumulator()
    collector.run(ids(), sums)
    assert collector.pool.names == set(collector.modules)


def test_other_numbers_of_heads():
    model = models.gpt2().eval()
    collector = AttentionCollector(model, sums)
    facts = dict.fromkeys(collector.modules, LayerFacts(3, True))
    collector = AttentionCollector(model, sums, layers=facts)
    collector.run(ids())
    assert all("weights have 3 heads" in reason for reason in collector.left_out.values())
    assert len(collector.left_out) == len(collector.modules)
    assert collector.know(dict.fromkeys(facts, LayerFacts(4, True))) == list(facts)


def test_layers_without_a_call():
    model = models.gpt2()
    outside = torch.nn.MultiheadAttention(8, 2)
    model.add_module("unused", outside)
    collector = AttentionCollector(model, sums)
    assert "unused" in collector.modules
    collector.run(ids())
    assert collector.left_out == {"unused": "no attention call of it was seen"}


def test_maxima():
    pool = SumAccumulator()
    for value in (1.0, 3.0, 2.0):
        pool.add("layer", Maxima(torch.full((1, 2, 2), value)), heads=4, where=slice(1, 3))
    (found,) = pool.sums().values()
    assert found.maximum.flatten().tolist() == [-torch.inf, 3.0, 3.0, -torch.inf]


def test_refuses_models_without_attention():
    with pytest.raises(ValueError, match="attention"):
        AttentionCollector(torch.nn.Linear(2, 2), sums)


def test_finish_of_one_run_is_the_metric():
    model = models.gpt2().eval()
    collector = AttentionCollector(model, sums)
    collector.run(ids())
    metric = AttentionStatistics(collector.heads)
    collector.pool.into(metric)
    want = metric.split(metric.compute()["entropy"])
    for name, own in collector.pool.sums().items():
        values = finish(type(own)(*(part.squeeze(1) for part in own)), standard_errors=False)
        torch.testing.assert_close(values["entropy"], want[name])
