"""Patches scaled_dot_product_attention, and the forward of layers that compute attention themselves."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.architecture.source_code import (
    calls_sdpa,
    calls_softmax,
    functions_of,
    own_classes,
    uses_interface,
)
from lightning_qk.capture import registry
from lightning_qk.capture.captured import Arguments, sdpa_call
from lightning_qk.capture.hooks import compiled
from lightning_qk.capture.hooks.modules import Wrapped
from lightning_qk.capture.hooks.patch import Patch, patch
from lightning_qk.capture.hooks.softmax import observed
from lightning_qk.capture.registry import STATE

NAME = "scaled_dot_product_attention"


def patch_sdpa(modules: Iterable[nn.Module], model: nn.Module | None) -> Iterator[Callable[[], None]]:
    """Patch the function wherever these modules find it: in torch, in their files, in their attributes.

    Args:
        modules: the attention layers.
        model: the network around them, whose files are searched too; None where it is not known.

    Yields:
        Functions that undo one patch each.
    """
    layers = list(modules)
    around = [] if model is None else list(model.modules())
    # Found before anything is replaced, and the same object however it was imported.
    function = _original(getattr(torch.nn.functional, NAME))
    files: dict[int, dict[str, Any]] = {}
    for kind in {kind for module in (*layers, *around) for kind in own_classes(type(module))}:
        for reached in functions_of(kind):
            files[id(reached.__globals__)] = reached.__globals__
        file = getattr(sys.modules.get(kind.__module__), "__dict__", None)
        if file is not None:
            files[id(file)] = file
    files.pop(id(vars(torch.nn.functional)), None)
    yield patch(torch.nn.functional, NAME, _tap)
    for space in files.values():
        for name, value in list(space.items()):
            if _original(value) is function:
                yield patch(space, name, _tap)
    for module in {id(module): module for module in (*layers, *around)}.values():
        for name, value in list(vars(module).items()):
            if _original(value) is function:
                yield patch(vars(module), name, lambda function, own: Wrapped(_tap(function, own), function))
    unobservable = {
        _defines_forward(type(module))
        for module in layers
        if calls_softmax(module) and not calls_sdpa(module) and not uses_interface(module)
    }
    for kind in {_defines_forward(type(module)) for module in layers} - {nn.Module}:
        yield patch(kind, "forward", functools.partial(_tap_forward, unobservable=kind in unobservable))
    for module in layers:
        if "forward" in vars(module) and not hasattr(module.forward, "_torchdynamo_orig_callable"):
            yield patch(module, "forward", functools.partial(_tap_own_forward, module))


def _original(value: Any) -> Any:
    return getattr(value, "_lightning_qk_original", value) if callable(value) else value


def _defines_forward(kind: type) -> type:
    return next(base for base in kind.__mro__ if "forward" in vars(base))


def _tap(function: Callable[..., Any], own: Patch) -> Callable[..., Any]:
    source = compiled.source_number(None, "sdpa")

    @functools.wraps(function)
    def tapped(*args: Any, **kwargs: Any) -> Any:
        if own.active:
            if torch.compiler.is_dynamo_compiling():
                if compiled.is_read(STATE):
                    compiled.emit_arguments(None, source, read_sdpa(*args, **kwargs))
            elif STATE.capturing and registry.is_free():
                _deliver(args, kwargs)
                with registry.mute():  # the name may have been patched twice
                    return function(*args, **kwargs)
        return function(*args, **kwargs)

    tapped._lightning_qk_original = _original(function)  # type: ignore[attr-defined]
    return tapped


def _tap_forward(function: Callable[..., Any], own: Patch, *, unobservable: bool) -> Callable[..., Any]:
    """A class's forward; ``unobservable``: its softmax is its own and cannot be observed inside a graph."""

    @functools.wraps(function)
    def tapped_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if own.active:
            if not torch.compiler.is_dynamo_compiling():
                if not STATE.capturing:
                    return function(self, *args, **kwargs)
                with observed(self):
                    return function(self, *args, **kwargs)
            # Without a graph, whose call it is can be read from the stack.
            module = compiled.identity(self) if compiled.is_read(STATE) else None
            if module is not None:
                if unobservable:
                    compiled.emit_problem(module, _IN_A_GRAPH)
                compiled.enter(module)
                output = function(self, *args, **kwargs)
                compiled.leave()
                return output
        return function(self, *args, **kwargs)

    return tapped_forward


def _tap_own_forward(module: nn.Module, function: Callable[..., Any], own: Patch) -> Wrapped:
    # Such as accelerate gives a module, around its class's.
    @functools.wraps(function)
    def tapped_forward(*args: Any, **kwargs: Any) -> Any:
        if own.active and STATE.capturing and not torch.compiler.is_dynamo_compiling():
            with observed(module):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return Wrapped(tapped_forward, function)


_IN_A_GRAPH = (
    "it multiplies and takes its softmax inside a graph of torch.compile, where that cannot be observed: leave "
    "this layer out of the graph (torch.compiler.disable) to have its attention measured"
)


@torch.compiler.disable
def _deliver(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # A function of torch that a graph did not trace through may call it from within the graph.
    is_entered, module = compiled.entered()
    if not is_entered:
        module = _caller()
    if module is not None:
        registry.deliver(module, lambda: sdpa_call(module, read_sdpa(*args, **kwargs)))


def _caller() -> nn.Module | None:
    """The innermost watched module that one of the running methods belongs to."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            owner = frame.f_locals.get(code.co_varnames[0])
            if isinstance(owner, nn.Module) and registry.is_watched(owner):
                return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def read_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **unknown: Any,
) -> Arguments | str:
    """Arguments of the function as attention with a batch and heads. Traced by torch.compile.

    The last three axes are heads, tokens and features, as in torch's documentation, and all before them the
    batch; a tensor of three axes is a batch of one head, one of two a single sequence.

    Returns:
        The arguments, or why that cannot be had.
    """
    if query.is_nested or key.is_nested:
        return "scaled_dot_product_attention gets nested tensors, which are not captured: pad the sequences"
    if query.dim() < 2 or key.dim() != query.dim():
        return (
            "scaled_dot_product_attention gets a query and a key of different numbers of axes "
            f"({query.dim()} and {key.dim()}): give both (batch, heads, tokens, features)"
        )
    n, m = query.shape[-2], key.shape[-2]
    mask = attn_mask
    if query.dim() == 2:
        query, key, value = query[None], key[None], value[None]
    if query.dim() == 3:
        query, key, value = query[:, None], key[:, None], value[:, None]
        if mask is not None and mask.dim() == 3:
            mask = mask[:, None]
    if mask is not None:
        if mask.dim() > query.dim():
            return (
                f"scaled_dot_product_attention gets a mask of {mask.dim()} axes for a query of {query.dim()}: "
                "give a mask that broadcasts to (batch, heads, queries, keys)"
            )
        while mask.dim() < query.dim():
            mask = mask[None]
    if query.shape[:-3] != key.shape[:-3]:
        batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])
        query = query.expand(*batch, *query.shape[-3:])
        key = key.expand(*batch, *key.shape[-3:])
        value = value.expand(*batch, *value.shape[-3:])
    if query.shape[-3] == 1 and key.shape[-3] != 1:
        query = query.expand(*query.shape[:-3], key.shape[-3], *query.shape[-2:])
    if query.dim() > 4:
        if mask is not None:
            mask = mask.expand(*query.shape[:-3], *mask.shape[-3:]).flatten(0, -4)
        query, key, value = query.flatten(0, -4), key.flatten(0, -4), value.flatten(0, -4)
    causal = bool(is_causal) and mask is None
    if causal and m > n:
        # Row i sees the keys up to the i-th, counted from the first.
        key, value = key[:, :, :n], value[:, :, :n]
    # A single row that may see one key alone needs no causality any more.
    return (query, key, value, mask), {"scaling": scale, "is_causal": causal and n > 1}
