"""Independent forms of what attention functions compute: dense, sequence by sequence, by their documentation."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.modeling_utils import AttentionInterface

from lightning_qk.capture.capture import AttentionCapture
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.attention import attention_sums, means
from lightning_qk.heads.reader import ProjectionReader, find_attention


def padding(side: str | None, batch: int = 2, length: int = 12, hidden: int = 4) -> Tensor | None:
    """A padding mask (batch, length) whose second sequence is shorter; "hole": its middle is left out."""
    if side is None:
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, {"left": slice(hidden), "right": slice(-hidden, None), "hole": slice(4, 4 + hidden)}[side]] = 0
    return mask


class Heard(AttentionCapture):
    """Statistics of all rows of every call, as a monitor takes them.

    Attributes:
        calls: name of the layer, the call, its statistics, and ``(batch, heads, n, m)``, in order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[tuple[str, object, dict[str, Tensor], tuple[int, ...]]] = []
        try:
            layers = ProjectionReader(model).layers
        except ValueError:
            layers = {}  # captured all the same

        def listen(name: str, call: CapturedCall) -> None:
            layer = layers.get(name)
            known = {} if layer is None else {"self_attention": layer.self_attention, "heads": layer.heads}
            logits = call.logits(**{"self_attention": None, **known})
            sums = attention_sums(logits)
            statistics = means(sums, per_sequence=False, standard_errors=False, has_sinks=True)
            self.calls.append((name, call, statistics, logits.shape))

        super().__init__(
            {module: name for name, module in find_attention(model).items()}, listen, model=model
        )

    @property
    def statistics(self) -> dict[str, list[dict[str, Tensor]]]:
        """Name of a layer to the statistics of its calls."""
        found: dict[str, list[dict[str, Tensor]]] = {}
        for name, _, statistics, _ in self.calls:
            found.setdefault(name, []).append(statistics)
        return found

    def __enter__(self) -> "Heard":
        self.install()
        self.enabled = True
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def measure(model: nn.Module, **inputs: Any) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Statistics of each layer's last call, and the layers' problems."""
    with Heard(model) as heard:
        model(**inputs)
    return {name: calls[-1] for name, calls in heard.statistics.items()}, heard.problems


def eager_maps(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """Attention maps that an eager copy of the model returns, by layer in their order."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    names = list(find_attention(model))
    if "decoder_attentions" not in output:
        return dict(zip(names, output.attentions, strict=True))
    order = {
        "encoder.block.{}.layer.0": output.encoder_attentions,
        "decoder.block.{}.layer.0": output.decoder_attentions,
        "decoder.block.{}.layer.1": output.cross_attentions,
    }
    return {
        next(name for name in names if name.startswith(prefix.format(i))): maps[i]
        for prefix, maps in order.items()
        for i in range(len(maps))
    }


def map_statistics(p: Tensor, keep: Tensor, *, sink: bool = False, offset: int = 0) -> dict[str, Tensor]:
    """Statistics that need probabilities alone, over the queries to keep (batch, n)."""
    p = p.double()
    n, m = p.shape[2:]
    everything = torch.cat([p, 1 - p.sum(-1, keepdim=True)], dim=-1) if sink else p
    weight = keep[:, None, :].double().expand(p.shape[:3])
    distance = (offset + torch.arange(n)[:, None] - torch.arange(m)).abs().double()

    def mean(rows):
        return (rows * weight).sum((0, 2)) / weight.sum((0, 2))

    return {
        "entropy": mean(torch.special.entr(everything.clamp_min(0)).sum(-1)),
        "participation": mean(1 / everything.square().sum(-1)),
        "max_prob": mean(p.amax(-1)),
        "distance": mean((p * distance).sum(-1)),
    }


def assert_statistics(got: dict[str, Tensor], want: dict[str, Tensor], **tolerance: float) -> None:
    """The wanted ones are among those got."""
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-4}
    for name, value in want.items():
        torch.testing.assert_close(
            got[name].double(), value.double(), msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


@contextmanager
def registered(**functions: Any) -> Iterator[None]:
    """Attention functions under names of their own."""
    with mock.patch.dict(AttentionInterface._global_mapping, functions):
        yield


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """flash_attn's own by its documentation: (batch, n, heads, d), the last query stands at the last key."""
    n, m, heads = q.shape[1], k.shape[1], q.shape[2]
    k, v = (tensor.repeat_interleave(heads // tensor.shape[2], dim=2).double() for tensor in (k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q.double(), k)
    logits = logits * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    place = torch.arange(n)[:, None] + m - n
    key = torch.arange(m)
    left, right = window_size
    if causal:
        right = 0
    hidden = torch.zeros(n, m, dtype=torch.bool)
    if left >= 0:
        hidden |= key < place - left
    if right >= 0:
        hidden |= key > place + right
    logits = logits.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        sink = s_aux.double().view(1, heads, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
    p = logits.softmax(-1)[..., :m].nan_to_num(0.0)
    return torch.einsum("bhij,bjhd->bihd", p, v).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """The same for sequences one after another, (tokens, heads, d)."""
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype)
    for i in range(len(cu_seqlens_q) - 1):
        rows = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        keys = slice(int(cu_seqlens_k[i]), int(cu_seqlens_k[i + 1]))
        out[rows] = flash_attn_func(
            q[None, rows],
            k[None, keys],
            v[None, keys],
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            s_aux=s_aux,
        )[0]
    return out


@contextmanager
def flash_stand_in() -> Iterator[None]:
    """transformers' flash attention with dense kernels in place of the package's."""
    process = flash_utils._lazy_define_process_function(flash_attn_varlen_func)
    values = {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": flash_attn_func,
        "_flash_varlen_fn": flash_attn_varlen_func,
        "_pad_fn": flash_utils._pad_input,
        "_unpad_fn": flash_utils._unpad_input,
        "_process_flash_kwargs_fn": process,
    }
    known = {name: value for name, value in values.items() if hasattr(flash_utils, name)}
    with mock.patch.multiple(flash_utils, **known):
        yield


def as_flash(model: nn.Module) -> nn.Module:
    """The model with flash attention, past the check that the package is installed."""
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        # Past the configuration's own check as well: GPT-OSS's asks for kernels that take sinks, as these do.
        object.__setattr__(config, "_attn_implementation_internal", "flash_attention_2")
    return model
