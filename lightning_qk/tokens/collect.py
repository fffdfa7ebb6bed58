"""Stream the moments of a model's queries and keys from its attention calls."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import call, evaluated
from lightning_qk.capture import CapturedCall
from lightning_qk.capture.hooks.modules import hook_before
from lightning_qk.functional.token_moments import TokenMoments
from lightning_qk.heads import HeadProjections, ProjectionReader, find_attention
from lightning_qk.metrics.collector import AttentionCollector
from lightning_qk.tokens.calls import TokenCalls, call_facts

__all__ = ["TokenMoments", "TokenMomentsWarning", "token_moments"]


class TokenMomentsWarning(UserWarning):
    """A layer is left out; the message names it and says why."""


def token_moments(model: nn.Module, batches: Iterable[Any]) -> dict[str, TokenMoments]:
    """Moments of the queries and keys of every layer's tokens before rotation, the first token apart.

    The model runs in evaluation mode without gradients and is left as it was. Queries and keys are those that
    attention multiplies, after norms; a known rotation is undone position by position, and compared with the
    projections of what entered the layer. Padding is left out. ``position_ids`` of a batch are respected.

    Args:
        model: any module that contains attention.
        batches: what the model is called with: mappings by name, lists and tuples by position, else the only
            argument; a tensor is passed as ``input_ids`` where the model takes those.

    Returns:
        Qualified layer name → moments, in the model's order. Layers whose queries and keys before rotation
        cannot be had are named in a :class:`~lightning_qk.tokens.TokenMomentsWarning`.

    Raises:
        ValueError: no batch, or no layer that can be read.
    """
    reader = ProjectionReader(model)
    modules = {name: module for name, module in find_attention(model).items() if name in reader}
    collector = _Collector({name: reader[name] for name in modules}, modules)
    calls = AttentionCollector(
        model, collector.add, modules=modules, layers=reader.layers, eager=True, operands=True
    )
    ran = False
    with evaluated(model), collector.inputs(), calls:
        for batch in batches:
            ran = True
            collector.calls.position = batch.get("position_ids") if isinstance(batch, Mapping) else None
            call(model, batch)
    if not ran:
        raise ValueError("expected at least one batch to take moments of, got none: pass some of the data")
    silent = dict.fromkeys(calls.silent(), "no attention call of it was seen")
    left_out = dict(reader.unread) | calls.left_out | silent
    for name, reason in left_out.items():
        warnings.warn(f"{name} left out of token moments: {reason}", TokenMomentsWarning, stacklevel=2)
    out = {
        name: collector.found[name] for name in modules if name in collector.found and name not in left_out
    }
    if not out:
        raise ValueError(
            f"expected a layer of {type(model).__name__} whose queries and keys can be had, got none of "
            f"{len(left_out)} ({next(iter(left_out.items()))}): see the layers' reasons"
        )
    return out


class _Collector:
    """Moments of each layer over calls."""

    def __init__(self, heads: dict[str, HeadProjections], modules: dict[str, nn.Module]) -> None:
        self._heads = heads
        self._modules = modules
        self.calls = TokenCalls(heads, heads.__getitem__)
        self.found: dict[str, TokenMoments] = {}

    @contextmanager
    def inputs(self) -> Iterator[None]:
        """Keep what enters the layers that rotate, until their call."""
        handles: list[Any] = []
        for name, module in self._modules.items():
            if self._heads[name].rotary is not None:
                handles += [hook_before(module, self._keep(name)), self.calls.hook_positions(name, module)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            self.calls.enter(name, *values)

        return hook

    @torch.no_grad()
    def add(self, name: str, call: CapturedCall) -> None:
        """Add one call; what it raises leaves the layer out."""
        head = self._heads[name]
        tokens = self.calls.read(name, call)
        moments = TokenMoments.of(
            tokens.query,
            tokens.key,
            query_mask=tokens.query_weight > 0,
            key_mask=tokens.key_weight > 0,
            self_attention=head.self_attention,
            known=self.found.get(name),
        )
        moments = dataclasses.replace(moments, **call_facts(tokens, call, head))
        before = self.found.get(name)
        self.found[name] = moments if before is None else before + moments
