"""What token moments cost at the attention calls of a measured step, and what a prediction from them costs."""

from collections.abc import Sequence

import torch
import transformers
from harness import Result, median_ratio, milliseconds, side_by_side
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_qk import predict_attention
from lightning_qk.capture import AttentionCall
from lightning_qk.capture.captured import FunctionCall
from lightning_qk.functional.token_sums import TokenLayout, moments_of, token_sums
from lightning_qk.heads import ProjectionReader
from lightning_qk.metrics import SumAccumulator
from lightning_qk.tokens.calls import TokenCalls

LENGTH, BATCH, HEADS, D_HEAD = 1024, 4, 12, 64


def gpt2() -> transformers.PreTrainedModel:
    """One layer of GPT-2's size."""
    config = transformers.GPT2Config(n_layer=1, vocab_size=100, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2Model(config)


def llama() -> transformers.PreTrainedModel:
    """The same with a rotation that is undone, and checked at every call."""
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=768, intermediate_size=64, num_attention_heads=12, vocab_size=100
    )
    return transformers.LlamaModel(config)


def token_moments() -> list[Result]:
    """Sums over sampled tokens, and predictions, against one fused attention forward."""
    return [*costs(gpt2(), (64, 128, 256)), *costs(llama(), (128,))]


def costs(model: transformers.PreTrainedModel, numbers: Sequence[int]) -> list[Result]:
    """Of some numbers of tokens a sequence, and of a prediction from the last."""
    kind, out = type(model).__name__.removesuffix("Model"), []
    shape = f"{kind}, n {LENGTH}, {HEADS} heads of {D_HEAD}, batch {BATCH}, causal"
    reader = ProjectionReader(model)
    (name, head), *_ = reader.items()
    call, entered = captured(model, model.get_submodule(name))
    query, key, value = call._call[1:4]
    calls, pool, generator = TokenCalls({name: head}, reader.__getitem__), SumAccumulator(), torch.Generator()

    def attend() -> None:
        scaled_dot_product_attention(query, key, value, is_causal=True)

    def measure(tokens: int) -> None:
        calls.enter(name, entered)
        pool.add(name, token_sums(*calls.read(name, call, tokens=tokens, generator=generator)[:6]))

    with torch.no_grad():
        for tokens in numbers:
            times = side_by_side([lambda tokens=tokens: measure(tokens), attend], repeats=41)
            what = f"moments of {tokens} tokens a sequence at an attention call / one sdpa forward; {shape}"
            out.append(result(f"token_moments_{kind.lower()}_{tokens}", times, 0.3, what))
        moments = moments_of(pool.sums()[name].total[:, 0], TokenLayout(D_HEAD), head.kv_heads)

        def predict() -> None:
            predict_attention(head, moments, length=LENGTH, is_causal=True, sequences=2)

        times = side_by_side([predict, attend], repeats=11)
    what = f"prediction of a layer's attention, 2 sequences / one sdpa forward; {shape}"
    return [*out, result(f"prediction_{kind.lower()}", times, 3.0, what)]


def captured(
    model: transformers.PreTrainedModel, module: torch.nn.Module
) -> tuple[FunctionCall, torch.Tensor]:
    """The attention call of a layer, and what entered it."""
    found: list[torch.Tensor] = []

    def keep(*call: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        found[:] = [part.detach() for part in call[1:4]]
        return call[1].transpose(1, 2), None

    def enter(_: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    module.register_forward_pre_hook(enter, with_kwargs=True)
    inputs = torch.randn(BATCH, LENGTH, HEADS * D_HEAD)
    ALL_ATTENTION_FUNCTIONS.register("benchmark", keep)
    model.set_attn_implementation("benchmark")
    with torch.no_grad():
        model(inputs_embeds=inputs)
        query, key, value = found
        model.set_attn_implementation("sdpa")
        model(inputs_embeds=inputs)
    options = {"is_causal": True, "scaling": D_HEAD**-0.5}
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    call = FunctionCall(AttentionCall(module, query, key, value, None, "sdpa", options, function))
    return call, found[-1].detach()


def result(name: str, times: list[list[float]], bar: float, measure: str) -> Result:
    """The median ratio, and between what half of the ratios lie."""
    ratios = sorted(a / b for a, b in zip(*times, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
    return Result(
        name,
        measure,
        median_ratio(times),
        bar,
        f"{milliseconds(times)}, half of {len(ratios)} pairs in {low:.3g} to {high:.3g}",
    )
