"""A differentiable attention mask that learns which offsets between query and key each head needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_qk.capture.call import AttentionCall, UnsupportedCallError
from lightning_qk.capture.registry import Run
from lightning_qk.functional.arguments import as_output
from lightning_qk.functional.logits import AttentionLogits, AttentionOptions, ProductLogits
from lightning_qk.interventions.penalties import Auxiliary, Penalty
from lightning_qk.interventions.replaced_attention import (
    EXTRA,
    Replaced,
    dense_logits,
    visible_keys,
    weighted,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

# A closed key's logit may exceed every open one's: its exponential is needed for the gates' gradient only.
_MOST_ABOVE = 30.0


class OffsetGates(nn.Module):
    """One gate for each head and each offset ``i − j`` of a query i and a key j.

    Args:
        heads: how many heads.
        max_length: offsets from ``1 − max_length`` to ``max_length − 1`` have a gate of their own; those further
            away share the last.
        temperature: of the gates' sampling.
        initial: mean of the gates' logits at the start; 0 opens half of them.

    Attributes:
        logits: ``(heads, 2 · max_length − 1)``, the smallest offset first.
    """

    def __init__(
        self, heads: int, max_length: int, *, temperature: float = 1.0, initial: float = 0.0
    ) -> None:
        super().__init__()
        if heads < 1 or max_length < 1 or temperature <= 0:
            raise ValueError(
                f"expected at least one head and one position, and a temperature above 0, got {heads}, "
                f"{max_length} and {temperature}"
            )
        self.temperature = temperature
        self.logits = nn.Parameter(initial + 1e-3 * torch.randn(heads, 2 * max_length - 1))

    @property
    def max_length(self) -> int:
        """How many positions have offsets of their own."""
        return (self.logits.shape[1] + 1) // 2

    def sample(self) -> Tensor:
        """Zeros and ones by a Gumbel-sigmoid, straight through: the gradient is that of the soft gates."""
        logits = self.logits.float()
        uniform = torch.rand_like(logits).clamp_(1e-6, 1 - 1e-6)
        soft = ((logits + uniform.logit()) / self.temperature).sigmoid()
        return (soft > 0.5).to(soft.dtype) + soft - soft.detach()

    def open(self) -> Tensor:
        """Which gates are open without sampling, boolean ``(heads, 2 · max_length − 1)``."""
        return self.logits.detach() > 0

    def by_pair(self, gates: Tensor, n: int, m: int, query_offset: int = 0) -> Tensor:
        """Gates of every query and key, ``(heads, n, m)``."""
        last = self.max_length - 1
        place = torch.arange(n, device=gates.device)[:, None] + query_offset
        offset = place - torch.arange(m, device=gates.device)
        return gates[:, offset.clamp(-last, last) + last]


def gated_attention(
    query: Tensor | AttentionLogits,
    key: Tensor | None = None,
    value: Tensor | None = None,
    gates: Tensor | None = None,
    *,
    dropout: float = 0.0,
    training: bool = True,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    """Softmax attention in which each pair's exponential is multiplied by a gate; takes eager attention's memory.

    The gradient reaches closed gates too: that of opening them. A row whose visible keys are all closed keeps
    them all.

    Args:
        query: ``(batch, heads, n, d_head)``; or an :class:`~lightning_qk.functional.AttentionLogits` by itself.
        key: ``(batch, kv_heads, m, d_head)``.
        value: ``(batch, kv_heads, m, d_value)``.
        gates: 0 or 1, broadcastable to ``(batch, heads, n, m)``.
        dropout: share of the weights that are set to 0.
        training: whether dropout is applied.
        options: mask, scaling and so on: :class:`~lightning_qk.functional.AttentionOptions`.

    Returns:
        ``(batch, heads, n, d_value)``.
    """
    logits, value = as_output(query, key, value, options)
    if gates is None:
        raise TypeError("expected gates of 0 or 1, got None: pass gates=")
    x, visible = dense_logits(logits)
    sinks = logits.sinks
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    shown = torch.ones_like(x, dtype=torch.bool) if visible is None else visible.expand_as(x)
    is_open = _open_keys(gates, shown)
    # Rows with all keys closed get no gradient of the gates.
    factor = torch.where(is_open & (gates.detach() <= 0.5), 1.0, gates.to(x.dtype))
    low = torch.finfo(x.dtype).min
    top = x.detach().masked_fill(~is_open, low).amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.detach().to(x.dtype).view(1, -1, 1, 1))
    top = torch.where(top == low, 0.0, top)
    weights = (x - top).clamp_max(_MOST_ABOVE).exp() * factor * shown
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks.to(x.dtype).view(1, -1, 1, 1) - top).exp()
    return weighted(weights / torch.where(total == 0, 1.0, total), value, dropout, training)


def _open_keys(gates: Tensor, shown: Tensor) -> Tensor:
    """Which visible keys are in a row's softmax: the open ones, or all where none is open."""
    is_open = (gates.detach() > 0.5) & shown
    return torch.where(is_open.any(-1, keepdim=True), is_open, shown)


class GatedAttention(Auxiliary, Replaced):
    """Puts gates on the attention of some modules within it, and a price on open ones; a context manager.

    While a module trains its gates are sampled at each call, and ``weight`` times the mean over layers of the
    mask's L1 norm, open visible pairs over all heads in a sequence, is added to the gradient of the loss. In
    evaluation a gate is open where its logit is positive.

    After SparseBERT's structured differentiable attention mask, arXiv 2102.12871 [V, code]. There one mask for
    all layers is symmetric in the offset and is added to the logits as ``−10000 (1 − gate)``; here every layer
    has its own, offsets have a sign, and gates multiply the exponentials, so that closed gates get the gradient of
    opening them [R].

    Args:
        names: the attention modules, and the name of each.
        gates: name → its gates.
        weight: price of the mask.
        model: the model that contains the modules.

    Raises:
        ValueError: a layer whose call does not pass through transformers' interface or cannot be read.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        gates: Mapping[str, OffsetGates],
        weight: float = 1e-4,
        *,
        model: nn.Module | None = None,
    ) -> None:
        Auxiliary.__init__(self, weight, len(names))
        Replaced.__init__(self, names, model=model, idle=self._without_gates)
        self._gates = {id(module): gates[name] for module, name in names.items()}

    def _wrap(self, name: str, call: AttentionCall, run: Run) -> Any:
        gates = self._gates[id(call.module)]
        # Drawn here, and not by the function: monitors measure the softmax with the same gates.
        drawn = gates.sample() if call.module.training else gates.open().float()
        return run(self._exchanged(name, call, {EXTRA: drawn}))

    def _without_gates(self, name: str, call: AttentionCall, run: Run) -> Any:
        """Calls of a layer without gates: its gates get zero gradients, since DDP waits for every parameter."""
        output = run(call)
        first = output[0] if isinstance(output, tuple) else output
        if not (call.module.training and torch.is_grad_enabled() and first.requires_grad):
            return output
        first = first + (0.0 * self._gates[id(call.module)].logits.sum()).to(first.dtype)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def _pairs(self, module: nn.Module, logits: ProductLogits, drawn: Tensor) -> Tensor:
        gates = self._gates[id(module)]
        _, heads, n, m = logits.shape
        if heads != gates.logits.shape[0]:
            raise UnsupportedCallError(f"it has {heads} heads and gates for {gates.logits.shape[0]}")
        return gates.by_pair(drawn, n, m, logits.query_offset)

    def _softmax(self, module: nn.Module, logits: ProductLogits, drawn: Tensor) -> ProductLogits:
        pairs = self._pairs(module, logits, drawn.detach())[None]
        visible = visible_keys(logits)
        shown = torch.ones_like(pairs, dtype=torch.bool) if visible is None else visible
        is_open = _open_keys(pairs, shown)
        mask = logits.mask
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            return logits.replace(mask=torch.where(is_open, mask, float("-inf")))
        return logits.replace(mask=is_open)

    def _compute(
        self, module: nn.Module, logits: ProductLogits, value: Tensor, dropout: float, drawn: Tensor
    ) -> Tensor:
        pairs = self._pairs(module, logits, drawn)
        output = gated_attention(logits, value=value, gates=pairs, dropout=dropout, training=module.training)
        if not (module.training and self.enabled and output.requires_grad):
            return output
        return self.attach(output, _price(logits, pairs))


def _price(logits: ProductLogits, pairs: Tensor) -> Penalty:
    """L1 norm of the mask over the pairs that are visible, a sequence's mean."""
    heads, n, m = pairs.shape
    visible = visible_keys(logits)
    count = pairs.new_ones(1) if visible is None else visible.to(pairs.dtype).mean(0)
    norm = (pairs * count).sum()
    share = norm.detach() / count.expand(heads, n, m).sum()
    return Penalty(norm, {"l1": norm, "open": share})
