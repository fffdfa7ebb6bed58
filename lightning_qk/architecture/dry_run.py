"""Run a module's own forward on a copy whose children are replaced, to see what it does with its inputs.

Neither the model nor its hooks nor its children take part: the copy shares the module's attributes and has
children of its own.
"""

import copy
import inspect
import random
import sys
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def alive(reference: "weakref.ref[nn.Module]") -> nn.Module:
    """The module that a plan refers to weakly.

    Raises:
        RuntimeError: it is gone.
    """
    module = reference()
    if module is None:
        raise RuntimeError(
            "expected the modules of the model that was read first, got one that is gone: keep a reference to the "
            "model, and call refresh() on the reader after replacing modules"
        )
    return module


class Stop(Exception):
    """Raised by a stand-in to end the run."""


class Through(nn.Module):
    """Stands for a child that is of no interest: gives its input back."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the input."""
        return x


def copy_with(module: nn.Module, children: Mapping[str, nn.Module | None]) -> nn.Module:
    """A copy of one module that shares its attributes and has other children; its forward is to be called."""
    made = object.__new__(type(module))
    # Out of training mode, since dropout would draw from the global generator; dictionaries of its own, since
    # a forward may set what they hold.
    made.__dict__.update(
        {**module.__dict__, "_buffers": dict(module._buffers), "_modules": dict(children), "training": False}
    )
    return made


def run_copy(
    module: nn.Module, children: Mapping[str, nn.Module | None], given: Tensor, **known: Any
) -> None:
    """Call a module's forward on a copy of it.

    Args:
        module: left untouched.
        children: what stands for each of its children.
        given: the first argument.
        known: attributes of the copy (``config``) and arguments by name; other required arguments are None.

    Raises:
        Exception: whatever the forward raises, `Stop` included.
    """
    copy = copy_with(module, children)
    if "config" in known:
        copy.__dict__["config"] = known.pop("config")
    forward = type(module).forward
    _, *arguments = inspect.signature(forward).parameters.values()
    required = {
        argument.name: None
        for argument in arguments[1:]
        if argument.default is argument.empty
        and argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
    }
    with torch.no_grad():
        forward(copy, given, **{**required, **known})


def gives_back(module: nn.Module) -> bool:
    """Whether a module gives its input back as it is, alone or as the first of several outputs."""
    given = torch.linspace(-3.0, 3.0, 12).view(1, 2, 6)
    try:
        with torch.no_grad():
            out = shadow(module)(given)
    except Exception:
        return False
    out = out[0] if isinstance(out, tuple) and out else out
    return isinstance(out, Tensor) and out.shape == given.shape and bool(torch.equal(out, given))


# Hooks by which torch makes a weight from other parameters, right before the forward: weight_norm, spectral_norm
# and pruning.
_MAKES_WEIGHTS = "torch.nn.utils."


def weight_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks of a module without which its forward finds no weight, or an old one."""
    return [
        hook
        for hook in module._forward_pre_hooks.values()
        if type(hook).__module__.startswith(_MAKES_WEIGHTS)
    ]


def make_weights(copy: nn.Module, hooks: Iterable[Callable[..., Any]]) -> None:
    """Let such hooks set the weights of a copy; the module itself is left alone."""
    for hook in hooks:
        hook(copy, ())


def shadow(
    module: nn.Module,
    *,
    convert: Callable[[Tensor], Tensor] | None = None,
    stand_ins: Mapping[nn.Module, nn.Module] | None = None,
) -> nn.Module:
    """A copy of a module and all modules in it that shares their tensors, and runs without hooks or dropout.

    The copies are in evaluation mode, so that nothing draws from the global generator and no statistics are
    updated; hooks do not see them, but for those that make weights. Gradients of what they compute reach the
    module's own parameters.

    Args:
        module: left untouched.
        convert: what is put in the place of each parameter and buffer.
        stand_ins: modules that take the places of others.
    """
    copies: dict[nn.Module, nn.Module] = dict(stand_ins or {})

    def tensors(owned: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        # Dictionaries of their own, since a forward may set what it holds.
        if convert is None:
            return dict(owned)
        return {name: None if tensor is None else convert(tensor) for name, tensor in owned.items()}

    def copy_of(original: nn.Module) -> nn.Module:
        if original in copies:
            return copies[original]
        copy = copies[original] = object.__new__(type(original))
        space = copy.__dict__
        space.update({name: _own_container(value) for name, value in original.__dict__.items()})
        space["_parameters"] = tensors(original._parameters)
        space["_buffers"] = tensors(original._buffers)
        space["_modules"] = {
            name: None if child is None else copy_of(child) for name, child in original._modules.items()
        }
        space["training"] = False
        forward = _forward(original)
        # No reference to the copy itself, which would have to wait for the garbage collector.
        space["_compiled_call_impl"] = _call(weakref.ref(copy), forward, weight_hooks(original))
        space.pop("forward", None)
        return copy

    return copy_of(module)


def _own_container(value: Any, depth: int = 2) -> Any:
    """A list, dictionary or set with the same contents, as a forward may put something into it."""
    if type(value) not in (list, deque, set, dict, OrderedDict, defaultdict):
        return value
    own = copy.copy(value)
    if depth and type(value) is list:
        own[:] = [_own_container(item, depth - 1) for item in value]
    elif depth and isinstance(value, dict):
        own.update({key: _own_container(item, depth - 1) for key, item in value.items()})
    return own


def _forward(module: nn.Module) -> Callable[..., Any]:
    """The function that computes a module's output, as a function of the module."""
    space = module.__dict__
    # Offloading keeps the forward that it wraps.
    own = space.get("_old_forward", space.get("forward"))
    if own is None:
        return type(module).forward
    function = getattr(own, "__func__", None)
    return (
        function
        if function is not None and own.__self__ is module
        else lambda _, *args, **kwargs: own(*args, **kwargs)
    )


def _call(
    reference: "weakref.ref[nn.Module]", forward: Callable[..., Any], hooks: list[Callable[..., Any]]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        copy = alive(reference)
        make_weights(copy, hooks)
        return forward(copy, *args, **kwargs)

    return call


@contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Whatever a module draws, the global generators of torch, Python and NumPy do not see it."""
    numpy: Any = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state)
        if numpy_state is not None:
            numpy.random.set_state(numpy_state)
