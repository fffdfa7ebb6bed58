"""A captured attention call, in one form wherever it was captured."""

import copy
import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.capture.call import AttentionCall, UnsupportedCallError
from lightning_qk.capture.conventions import read_logits
from lightning_qk.capture.verify import convention_of
from lightning_qk.functional.chunks import MASKED_BELOW
from lightning_qk.functional.logits import AttentionLogits, ProductLogits
from lightning_qk.heads.facts import head_count

PRODUCTS = ("none", "rotary", "rotary (2-D)")
"""Positions that leave the logits what they are: products of queries and keys."""

# A factor is fitted to so many rows of two sequences, of logits above the bound; the relative error it may leave.
_ROWS = 128
_MASKED = -1e3
_FIT = 1e-2


class AttentionOutput(NamedTuple):
    """Logits and values of a call.

    Attributes:
        logits: of the call.
        value: ``(batch, kv_heads, m, d_value)``.
    """

    logits: AttentionLogits
    value: Tensor


class CapturedCall(ABC):
    """One attention call.

    Attributes:
        module: the attention layer.
        implementation: name in the model's config: ``"eager"``, ``"sdpa"``, ...; ``"softmax"`` for attention that
            a layer computes itself.
        d_head: width of the queries and keys.
        lengths: number of queries and of keys.
        operands: queries ``(..., n, d)`` and keys ``(..., m, d)`` whose products the logits are; None if not kept.
        inputs: what the layer projects to query and key, where the call itself knows it.
        value: what was passed as the value; None where it is not seen.
        self_attention: whether queries and keys are the same tokens; None where unknown.
        heads: how many heads the call has; None where unknown.
    """

    module: nn.Module
    implementation: str
    d_head: int
    lengths: tuple[int, int]
    operands: tuple[Tensor, Tensor] | None
    inputs: tuple[Tensor, ...] = ()
    value: Any = None
    self_attention: bool | None = None
    heads: int | None = None

    def known(self, *, self_attention: bool | None = None, heads: int | None = None) -> "CapturedCall":
        """A copy of the call that knows these facts of its layer, besides what it knows; None tells nothing."""
        call = copy.copy(self)
        if self_attention is not None:
            call.self_attention = self_attention
        if heads is not None:
            call.heads = heads
        return call

    @property
    @abstractmethod
    def scaling(self) -> float | None:
        """The factor on the products; None where it is not certain."""

    @abstractmethod
    def _logits(self) -> AttentionLogits: ...

    @abstractmethod
    def _products(self, position: str | None) -> AttentionLogits: ...

    def _output(self) -> AttentionOutput:
        raise UnsupportedCallError(
            "the softmax is taken in a forward of its own, where logits are seen but not queries, keys and "
            "values: AttentionMonitor measures what follows from logits alone"
        )

    def logits(self, *, self_attention: bool | None = None, heads: int | None = None) -> AttentionLogits:
        """The logits of the call, without gradients.

        Args:
            self_attention: whether queries and keys are the same tokens; None: as the call knows.
            heads: how many heads the call has: the logits of a softmax may hold heads and batch in one axis.
                None: as the call knows.

        Raises:
            UnsupportedCallError: the softmax of the call cannot be reconstructed.
        """
        return self.known(self_attention=self_attention, heads=heads)._logits()

    def output(self, *, self_attention: bool | None = None) -> AttentionOutput:
        """The logits and values of the call's output, without gradients; arguments as for :meth:`logits`."""
        return self.known(self_attention=self_attention)._output()

    def products(
        self,
        *,
        self_attention: bool | None = None,
        heads: int | None = None,
        position: str | None = None,
    ) -> AttentionLogits:
        """``scaling q·k`` of the visible pairs, without what is added to it.

        Args:
            self_attention: as for :meth:`logits`.
            heads: likewise.
            position: what positions do to the layer's logits, see :class:`~lightning_qk.HeadProjections`: the
                logits of a softmax are products only where positions add nothing.

        Raises:
            UnsupportedCallError: the products of the call cannot be reconstructed.
        """
        return self.known(self_attention=self_attention, heads=heads)._products(position)


OWN_SOFTMAX = "_lightning_qk_softmax"
"""Attribute of an attention function that gives its softmax: a function of the call that returns the logits, with
gradients, and the values."""


def attention_logits(call: AttentionCall, *, self_attention: bool | None) -> tuple[ProductLogits, Any]:
    """The logits of a call, with tensors that gradients flow through, and the value of their keys.

    Args:
        call: what the attention function received.
        self_attention: whether queries and keys are the same tokens; None where unknown.

    Raises:
        UnsupportedCallError: the function's softmax cannot be reconstructed.
    """
    own = getattr(call.function, OWN_SOFTMAX, None)
    if own is not None:
        logits, value = own(call)
        n, m = logits.shape[2:]
        return logits.replace(self_attention=n == m if self_attention is None else self_attention), value
    return read_logits(call, convention_of(call), self_attention=self_attention)


class FunctionCall(CapturedCall):
    """The call of an attention function.

    Args:
        call: what it received.
    """

    def __init__(self, call: AttentionCall) -> None:
        self._call = call
        self.module = call.module
        self.implementation = call.implementation
        self.d_head = int(call.query.shape[-1])
        self.lengths = call.query.shape[-2], call.key.shape[-2]
        self.operands = call.query, call.key
        self.inputs = call.inputs
        self.value = call.value

    @property
    def scaling(self) -> float | None:
        """The factor on the products."""
        given = self._call.options.get("scaling")
        return self.d_head**-0.5 if given is None else given

    def _logits(self) -> ProductLogits:
        return attention_logits(self._call, self_attention=self.self_attention)[0].detach()

    def _products(self, position: str | None) -> AttentionLogits:
        return self._logits().products()

    def _output(self) -> AttentionOutput:
        logits, value = attention_logits(self._call, self_attention=self.self_attention)
        m = logits.shape[3]
        if not isinstance(value, Tensor) or value.dim() != 4 or value.shape[2] != m:
            form = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UnsupportedCallError(
                f"expected values (batch, kv_heads, m, d_value) of {m} keys, got {form}: the output cannot be "
                "made again from what its attention function received"
            )
        return AttentionOutput(logits.detach(), value.detach())


Arguments = tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], dict[str, Any]]
"""Query, key, value and mask of four axes as ``"sdpa"`` takes them, and the options."""


def sdpa_call(module: nn.Module, found: Arguments | str, inputs: tuple[Tensor, ...] = ()) -> FunctionCall:
    """A call of scaled_dot_product_attention.

    Raises:
        UnsupportedCallError: ``found`` is the reason why there are no arguments.
    """
    if isinstance(found, str):
        raise UnsupportedCallError(found)
    return FunctionCall(AttentionCall(module, *found[0], "sdpa", found[1], inputs=inputs))


class SoftmaxCall(CapturedCall):
    """The softmax of attention that a layer computes itself.

    Args:
        module: the attention layer.
        tensor: what the softmax gets, masks and biases included; its last two axes are queries and keys,
            ``(..., n, m)``. How heads and sequences lie before them: :meth:`by_head`.
        d_head: width of the vectors whose products the logits are.
        relative: rows are known up to a constant, since the layer subtracted their maximum.
        sinks: how many of the last columns, 0 or 1, are no keys but a learnt sink's logit.
        operands: queries and keys as the layer multiplied them; None unless the capture asked for them.
    """

    implementation = "softmax"

    def __init__(
        self,
        module: nn.Module,
        tensor: Tensor,
        d_head: int,
        relative: bool = False,
        sinks: int = 0,
        *,
        operands: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.module = module
        self.tensor = tensor
        self.d_head = d_head
        self.relative = relative
        self._sinks = sinks
        self.operands = operands
        self.lengths = tensor.shape[-2], tensor.shape[-1] - sinks

    @property
    def scaling(self) -> float | None:
        """The factor that explains the logits by the operands, where one does."""
        if self.operands is None:
            return None
        return _fitted_scaling(self.tensor[..., : self.lengths[1]], self.operands)

    def _logits(self) -> AttentionLogits:
        logits, sinks = self.by_head(self.heads), None
        if self._sinks:
            logits, sinks = logits[..., : -self._sinks], logits[..., -1]
        return AttentionLogits.given(
            logits,
            query_offset=_query_offset(logits, self.self_attention),
            self_attention=self.self_attention,
            relative=self.relative,
            sinks=sinks,
        )

    def _products(self, position: str | None) -> AttentionLogits:
        if self.relative or position not in PRODUCTS:
            raise UnsupportedCallError(
                "it takes its softmax itself, of logits from which q · k cannot be separated; with "
                'attn_implementation="sdpa" or "eager" they may be, where the model has one'
            )
        return self._logits()

    def by_head(self, heads: int | None) -> Tensor:
        """The logits as ``(batch, heads, n, m)``: axes before the heads, and windows and blocks, are the batch.

        Columns of sinks stay behind those of the keys.

        Args:
            heads: how many heads the layer has; None: as its attributes say.

        Raises:
            UnsupportedCallError: the axis of the heads is not certain.
        """
        logits = self.tensor
        if hasattr(logits, "to_local"):
            logits = logits.to_local()
        leading = tuple(logits.shape[:-2])
        n, m = logits.shape[-2:]
        if heads is None:
            heads = head_count(self.module)
        if heads is None and len(leading) == 2:
            return logits
        if heads is not None:
            if heads == 1 or (len(leading) == 1 and leading[0] % heads == 0):
                return logits.reshape(-1, heads, n, m)
            if len(leading) == 2 and leading[1] == heads:
                return logits
            # The batch comes first.
            places = [place for place, size in enumerate(leading) if place and size == heads]
            if len(leading) > 2 and len(places) == 1:
                return logits.movedim(places[0], -3).reshape(-1, heads, n, m)
            if len(leading) > 2 and not places and math.prod(leading[1:]) == heads:
                return logits.reshape(-1, heads, n, m)  # key heads, and the query heads of each
        known = "of unknown number" if heads is None else f"of which there are {heads}"
        raise UnsupportedCallError(
            f"its softmax gets logits of shape {tuple(logits.shape)}, whose heads, {known}, cannot be "
            "distinguished from the batch: it has no statistics"
        )


def _query_offset(logits: Tensor, self_attention: bool | None) -> int | None:
    """Place of the first query among the keys; None where queries have none.

    Args:
        logits: ``(batch, heads, n, m)``.
        self_attention: whether queries and keys are the same tokens; None where unknown.
    """
    n, m = logits.shape[2:]
    if self_attention is False:
        return None
    if n == m:
        return 0
    if not self_attention or n > m:
        return None
    # With a cache the queries are the newest tokens: each row sees one key more than the one before, its own.
    visible = ~(logits[:, 0] <= MASKED_BELOW)
    last = (visible * torch.arange(1, m + 1, device=logits.device)).amax(-1) - 1
    offset = last - torch.arange(n, device=logits.device)
    is_row = last >= 0
    if not bool(is_row.any()):
        return None
    first = offset[is_row][0]
    pairs = is_row[:, 1:] & is_row[:, :-1]
    more = (visible[:, 1:] ^ visible[:, :-1]).sum(-1)
    if bool(((offset != first) & is_row).any() | ((more != 1) & pairs).any()):
        return None
    return int(first)


def _fitted_scaling(logits: Tensor, operands: tuple[Tensor, Tensor]) -> float | None:
    """The factor between the products of queries and keys and the logits; None where it is not certain.

    A constant of a row does not change the softmax, and what is the same in all sequences comes from positions.
    """
    query, key = operands
    try:
        lead = logits.shape[:-2]
        query, key = query.expand(*lead, *query.shape[-2:]), key.expand(*lead, *key.shape[-2:])
    except RuntimeError:
        return None
    if (*lead, query.shape[-2], key.shape[-2]) != tuple(logits.shape):
        return None
    if lead:
        query, key, logits = query[:2], key[:2], logits[:2]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    query, key, logits = query[..., :_ROWS, :].to(wide), key.to(wide), logits[..., :_ROWS, :].to(wide)
    dots = query @ key.mT
    kept = logits.isfinite() & (logits > _MASKED) & dots.isfinite()
    for across in (False, True):
        if across:
            if not lead or len(logits) < 2:
                return None
            kept = kept.all(0, keepdim=True).expand_as(kept)
            dots, logits = (own - own.mean(0, keepdim=True) for own in (dots, logits))
        count = kept.sum(-1, keepdim=True).clamp_min(1)
        change, outcome = (
            torch.where(kept, own - torch.where(kept, own, 0).sum(-1, keepdim=True) / count, 0)
            for own in (dots, logits)
        )
        size = change.square().sum()
        if not float(size) > 0:
            continue
        factor = (change * outcome).sum() / size
        left = (outcome - factor * change).norm()
        if bool(left <= _FIT * outcome.norm()) and bool(outcome.norm() > 0):
            return float(factor)
    return None
