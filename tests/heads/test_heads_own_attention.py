"""Models that compute attention themselves: the oracle is what reaches the matrix product and the softmax."""

import pytest
import torch
import transformers as tf
from heads_oracle import project, randomize
from heads_zoo import BERT, GPT2, WIDTH
from torch.overrides import TorchFunctionMode

from lightning_qk.heads.reader import head_projections, unread

PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "scaled_dot_product_attention"}


class Record(TorchFunctionMode):
    """Keep the operands of every product of queries and keys, and every softmax's input."""

    def __init__(self):
        super().__init__()
        self.products, self.logits = [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.__name__
        if name in PRODUCTS:
            operands = [kwargs.get(key) for key in ("batch1", "batch2")] if "batch1" in kwargs else list(args)
            first, second = operands[1:3] if name == "baddbmm" and len(args) > 2 else operands[:2]
            if name == "scaled_dot_product_attention":
                second = second.mT
            self.products.append((first, second))
        if name == "softmax":
            self.logits.append(args[0])
        return function(*args, **kwargs)


TINY = {**BERT, "alibi": False}
SMALL = {
    "bloom": (
        "BloomModel",
        "BloomConfig",
        {"hidden_size": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": 50},
    ),
    "mpt": ("MptModel", "MptConfig", {"d_model": WIDTH, "n_layers": 2, "n_heads": 4, "vocab_size": 50}),
    "falcon-7b": ("FalconModel", "FalconConfig", {**TINY, "multi_query": True}),
    "falcon-rw": ("FalconModel", "FalconConfig", {**TINY, "multi_query": False, "bias": True}),
    "falcon-40b": (
        "FalconModel",
        "FalconConfig",
        {**TINY, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "codegen": ("CodeGenModel", "CodeGenConfig", {**GPT2, "n_head": 8, "rotary_dim": 4}),
    "gptj": ("GPTJModel", "GPTJConfig", {**GPT2, "rotary_dim": 4}),
    "gpt-neo": (
        "GPTNeoModel",
        "GPTNeoConfig",
        {
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 50,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "openai-gpt": ("OpenAIGPTModel", "OpenAIGPTConfig", GPT2),
    "rembert": (
        "RemBertModel",
        "RemBertConfig",
        {**BERT, "input_embedding_size": 16, "output_embedding_size": 16},
    ),
    "xlm": ("XLMModel", "XLMConfig", {"emb_dim": WIDTH, "n_layers": 2, "n_heads": 4, "n_words": 50}),
}
# The position enters the logits as an added bias.
ALIBI = {"bloom", "mpt"}


def _record(name):
    model, config, options = SMALL[name]
    torch.manual_seed(0)
    model = getattr(tf, model)._from_config(getattr(tf, config)(**options), attn_implementation="eager")
    model = randomize(model).eval()
    tokens = torch.randint(3, 50, (1, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens}
    if name in ("codegen", "gptj") or name.startswith("falcon"):
        inputs["position_ids"] = torch.zeros_like(tokens)
    read = head_projections(model)
    hidden = {}
    for layer in read:

        def keep(module, args, kwargs, layer=layer):
            hidden[layer] = args[0] if args else kwargs["hidden_states"]

        model.get_submodule(layer).register_forward_pre_hook(keep, with_kwargs=True)
    record = Record()
    with torch.no_grad(), record:
        model(**inputs)
    return model, read, hidden, record


def _close(ours, theirs):
    return ours.numel() == theirs.numel() and torch.allclose(
        ours, theirs.reshape(ours.shape), rtol=1e-5, atol=5e-5
    )


@pytest.mark.parametrize("name", sorted(SMALL))
def test_weights_give_the_operands_of_the_product(name):
    model, read, hidden, record = _record(name)
    assert len(read) == 2
    assert unread(model) == {}
    for layer, heads in read.items():
        query = project(heads.query, heads.query_bias, hidden[layer])[0]
        key = project(heads.key, heads.key_bias, hidden[layer])[0]
        every_key = key.repeat_interleave(heads.heads // heads.kv_heads, 0)
        factors = (1.0, heads.scaling)
        assert any(
            _close(factor * query, first) and (_close(key.mT, second) or _close(every_key.mT, second))
            for first, second in record.products
            for factor in factors
        ), layer


@pytest.mark.parametrize("name", sorted(set(SMALL) - ALIBI))
def test_scaled_products_are_the_logits(name):
    _, read, hidden, record = _record(name)
    for layer, heads in read.items():
        query = project(heads.query, heads.query_bias, hidden[layer])
        key = project(heads.key, heads.key_bias, hidden[layer]).repeat_interleave(
            heads.heads // heads.kv_heads, 1
        )
        # The last query sees every key.
        last = (heads.scaling * query @ key.mT)[:, :, -1]
        assert any(_close(last, logits[..., -1, :]) for logits in record.logits), layer
