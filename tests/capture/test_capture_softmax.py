"""Layers that take the softmax themselves: their statistics against the maps that the models return."""

import warnings

import lightning as L
import pytest
import torch
import transformers as tf
from call_oracle import Heard, map_statistics, padding
from torch import Tensor, nn

from lightning_qk import AttentionMonitor
from lightning_qk.capture.call import UnsupportedCallError
from lightning_qk.capture.captured import SoftmaxCall

SMALL = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BERT = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
TOYS = {
    "bloom": ("BloomModel", "BloomConfig", {**SMALL, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gptj": ("GPTJModel", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeoModel",
        "GPTNeoConfig",
        {
            **SMALL,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 64,
        },
    ),
    "codegen": ("CodeGenModel", "CodeGenConfig", {**GPT, "rotary_dim": 4}),
    "mpt": ("MptModel", "MptConfig", {"vocab_size": 50, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "openai-gpt": ("OpenAIGPTModel", "OpenAIGPTConfig", {**GPT}),
    "xlnet": (
        "XLNetModel",
        "XLNetConfig",
        {**SMALL, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    ),
    "roformer": ("RoFormerModel", "RoFormerConfig", {**BERT, "embedding_size": 32}),
    "deberta": (
        "DebertaModel",
        "DebertaConfig",
        {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "deberta-v2": (
        "DebertaV2Model",
        "DebertaV2Config",
        {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    ),
}
CAUSAL = {"bloom", "gptj", "gpt_neo", "codegen", "mpt", "openai-gpt"}


def toy(name: str) -> nn.Module:
    model, config, options = TOYS[name]
    torch.manual_seed(0)
    built = getattr(tf, model)(getattr(tf, config)(**options))
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return built


def tokens(count: int = 12) -> Tensor:
    return torch.randint(3, 50, (2, count), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("side", [None, "right"])
@pytest.mark.parametrize("name", TOYS)
def test_statistics_are_those_of_the_maps_that_the_model_returns(name, side):
    model = toy(name).eval()
    inputs = {"input_ids": tokens()}
    keep = torch.ones(2, 12, dtype=torch.bool)
    if side is not None:
        inputs["attention_mask"] = padding(side)
        # XLNet's padding sees itself, and is a token like others to who looks at logits alone.
        keep = keep if name == "xlnet" else inputs["attention_mask"].bool()
    with torch.no_grad(), Heard(model) as heard:
        model(**inputs)
    assert heard.problems == {}
    assert all(isinstance(call, SoftmaxCall) for _, call, *_ in heard.calls)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    assert len(maps) == len(heard.statistics) == 2
    for (layer, (got,)), p in zip(heard.statistics.items(), maps, strict=True):
        assert p.shape == (2, 4, 12, 12)
        if side is None and name in CAUSAL:
            assert not p.triu(1).any()
        for statistic, want in map_statistics(p, keep).items():
            value = got[statistic].double()
            torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-4, msg=f"{layer} {statistic}")


@pytest.mark.parametrize("name", ["bloom", "gptj", "xlnet", "deberta"])
def test_training_is_bit_identical_and_dropout_comes_after(name):
    model = toy(name).train()

    def run(listen: bool) -> tuple[Tensor, list[Tensor], Heard]:
        model.zero_grad()
        torch.manual_seed(7)
        heard = Heard(model)
        if listen:
            with heard:
                output = model(input_ids=tokens())[0]
        else:
            output = model(input_ids=tokens())[0]
        output.square().mean().backward()
        return output, [p.grad.clone() for p in model.parameters() if p.grad is not None], heard

    before, gradients, _ = run(False)
    state = torch.random.get_rng_state()
    after, same, heard = run(True)
    assert torch.equal(before, after)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    assert heard.problems == {}
    # Probabilities before dropout sum to 1: no row is more certain than certain.
    assert all((found["max_prob"] <= 1).all() for (found,) in heard.statistics.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_layer_counts_once(use_reentrant):
    model = toy("bloom").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with Heard(model) as heard, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
        model(inputs_embeds=embedded)[0].square().mean().backward()
    assert heard.problems == {}
    assert [len(calls) for calls in heard.statistics.values()] == [1, 1]


def test_the_forward_is_the_classes_own_again():
    from transformers.models.bloom.modeling_bloom import BloomAttention

    before = BloomAttention.forward
    model = toy("bloom")
    with Heard(model):
        assert BloomAttention.forward is not before
    assert BloomAttention.forward is before


@pytest.mark.parametrize(
    ("model", "config", "options", "length", "said"),
    [
        (
            "LongformerModel",
            "LongformerConfig",
            {**BERT, "attention_window": 4},
            12,
            "does not hold whole rows",
        ),
        (
            "ReformerModel",
            "ReformerConfig",
            {
                "vocab_size": 50,
                "hidden_size": 32,
                "num_attention_heads": 2,
                "attention_head_size": 16,
                "feed_forward_size": 48,
                "attn_layers": ["lsh"],
                "lsh_attn_chunk_length": 4,
                "num_buckets": 2,
                "local_attn_chunk_length": 4,
                "axial_pos_embds": False,
                "max_position_embeddings": 64,
                "is_decoder": True,
            },
            12,
            "sorts tokens into buckets",
        ),
    ],
)
def test_what_is_no_whole_row_is_named_and_never_wrong(model, config, options, length, said):
    built = getattr(tf, model)(getattr(tf, config)(**options)).eval()
    with torch.no_grad(), Heard(built) as heard, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built(input_ids=tokens(length))
    assert heard.statistics == {}
    assert heard.problems
    assert all(said in reason for reason in heard.problems.values())


class Routed(nn.Module):
    """Attention whose forward also routes tokens by a softmax, which is over no products of tokens."""

    def __init__(self, router: bool, twice: bool = False) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        self.gate = nn.Linear(16, 12)
        self.num_heads = 4
        self.router, self.twice = router, twice

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (4, 4)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        logits = q @ k.transpose(-1, -2) / 2
        p = logits.softmax(-1)
        if self.twice:
            p = p + (k @ q.transpose(-1, -2)).softmax(-1)
        out = (p @ v).transpose(1, 2).flatten(2)
        return out * self.gate(x).softmax(-1)[..., :1] if self.router else out


class Attention(Routed):
    """Named as attention is."""


def test_a_routers_softmax_is_not_attention():
    module = nn.Sequential(Attention(router=True))
    x = torch.randn(2, 12, 16)
    with torch.no_grad(), Heard(module) as heard:
        module(x)
    (calls,) = heard.statistics.values()
    assert heard.problems == {}
    layer = module[0]
    q, k = (project(x).unflatten(-1, (4, 4)).transpose(1, 2) for project in (layer.q_proj, layer.k_proj))
    p = (q.double() @ k.double().mT / 2).softmax(-1)
    torch.testing.assert_close(calls[0]["max_prob"].double(), p.amax(-1).mean((0, 2)), rtol=1e-5, atol=1e-5)


def test_two_attentions_of_one_layer_are_named():
    module = nn.Sequential(Attention(router=False, twice=True))
    with torch.no_grad(), Heard(module) as heard:
        module(torch.randn(2, 12, 16))
    assert "several softmaxes" in next(iter(heard.problems.values()))


def test_trouble_in_looking_on_is_no_trouble_of_the_model(monkeypatch):
    from lightning_qk.capture.hooks import traces

    def broken(*args: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(traces, "_product", broken)
    model = toy("gptj").eval()
    with torch.no_grad(), Heard(model) as heard:
        output = model(input_ids=tokens())[0]
    assert torch.equal(output, model(input_ids=tokens())[0])
    assert all("could not be observed" in reason for reason in heard.problems.values())
    assert len(heard.problems) == 2


def test_heads_are_distinguished_from_the_batch():
    def call(*shape: int) -> SoftmaxCall:
        return SoftmaxCall(nn.Identity(), torch.randn(*shape, 5, 6), 8)

    assert call(2, 4).by_head(None).shape == (2, 4, 5, 6)
    assert call(8).by_head(4).shape == (2, 4, 5, 6)
    assert call(2, 3, 4).by_head(4).shape == (6, 4, 5, 6)
    assert call(2, 4, 3).by_head(4).shape == (6, 4, 5, 6)
    for shape, heads in (((7,), 4), ((8,), None), ((2, 3), 4)):
        with pytest.raises(UnsupportedCallError, match="cannot be distinguished"):
            call(*shape).by_head(heads)


def test_the_place_of_the_first_query():
    def offset(logits: Tensor, own: bool | None) -> int | None:
        return SoftmaxCall(nn.Identity(), logits, 8).logits(self_attention=own, heads=2).query_offset

    logits = torch.zeros(1, 2, 3, 5)
    assert offset(torch.zeros(1, 2, 4, 4), None) == 0
    assert offset(logits, False) is None
    cached = logits.masked_fill(~torch.ones(3, 5, dtype=torch.bool).tril(2), float("-inf"))
    assert offset(cached, True) == 2


def test_the_monitor_logs_them_like_others(tmp_path):
    class Job(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = toy("gptj")

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.network(input_ids=batch)[0].square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    monitor = AttentionMonitor(1, report=False)
    trainer = L.Trainer(
        max_steps=2,
        callbacks=[monitor],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Job(), torch.utils.data.DataLoader(tokens().repeat(2, 1), batch_size=2))
    metrics = trainer.callback_metrics
    assert 0 < metrics["attn/entropy/mean"] < torch.log(torch.tensor(12.0))
    assert metrics["attn/distance/mean"].isfinite()
    assert metrics["attn/max_logit/max"].isfinite()
