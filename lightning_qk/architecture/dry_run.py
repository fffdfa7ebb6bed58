"""Run a model, or a part of it on a copy, and leave modes, hooks and global generators as they were."""

import copy
import inspect
import itertools
import random
import sys
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Stop(Exception):
    """Raised by a stand-in to end the run."""


class Through(nn.Module):
    """Stands for a child that is of no interest: gives its input back."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the input."""
        return x


def run_alone(module: nn.Module, stand_ins: Mapping[nn.Module, nn.Module], given: Tensor) -> None:
    """Run a module's forward on a copy with other children.

    Args:
        module: left untouched.
        stand_ins: what replaces its children.
        given: the first argument; other required ones are None.

    Raises:
        Exception: whatever the forward raises, `Stop` included.
    """
    _, _, *others = inspect.signature(type(module).forward).parameters.values()
    required = {
        own.name: None
        for own in others
        if own.default is own.empty and own.kind in (own.POSITIONAL_OR_KEYWORD, own.KEYWORD_ONLY)
    }
    with torch.no_grad():
        shadow(module, stand_ins=stand_ins)(given, **required)


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
    return _copy(module, dict(stand_ins or {}), convert)


def _copy(
    original: nn.Module,
    copies: dict[nn.Module, nn.Module],
    convert: Callable[[Tensor], Tensor] | None,
) -> nn.Module:
    if original in copies:
        return copies[original]
    copy = copies[original] = object.__new__(type(original))
    space = copy.__dict__
    space.update({name: _own_container(value) for name, value in original.__dict__.items()})
    for kind in ("_parameters", "_buffers"):
        # Dictionaries of their own, since a forward may set what it holds.
        space[kind] = {
            name: tensor if tensor is None or convert is None else convert(tensor)
            for name, tensor in getattr(original, kind).items()
        }
    space["_modules"] = {
        name: None if child is None else _copy(child, copies, convert)
        for name, child in original._modules.items()
    }
    space["training"] = False
    # No reference to the copy itself, which would have to wait for the garbage collector.
    space["_compiled_call_impl"] = _call(weakref.ref(copy), _forward(original), weight_hooks(original))
    space.pop("forward", None)
    return copy


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
        copy = reference()
        assert copy is not None  # it is being called
        make_weights(copy, hooks)
        return forward(copy, *args, **kwargs)

    return call


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: that of its first parameter or buffer, or the CPU."""
    tensor: Any = next(itertools.chain(module.parameters(), module.buffers()), None)
    if tensor is None:
        return torch.device("cpu")
    # Shards of a DTensor may be kept elsewhere.
    mesh = getattr(tensor, "device_mesh", None)
    return tensor.device if mesh is None else torch.device(mesh.device_type)


@contextmanager
def quietly(module: nn.Module) -> Iterator[None]:
    """No gradients in this block; what a module draws, generators of torch, Python and NumPy do not notice."""
    numpy: Any = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    tensors = itertools.chain(module.parameters(), module.buffers())
    devices = sorted({own.device.index or 0 for own in tensors if own.device.type == "cuda"})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        if numpy_state is not None:
            numpy.random.set_state(numpy_state)


@contextmanager
def in_evaluation_mode(module: nn.Module) -> Iterator[None]:
    """A module and all in it in evaluation mode; those that trained do so again at the end, and no others."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random generators are restored at the end.

    What was compiled runs eagerly, and its graphs stay for those who train. Not inference mode, in which
    Lightning validates: what is kept for later, such as a reader's plan, would hold tensors without
    gradients.
    """
    # Models without dropout may draw too: hashing attention does.
    with torch.inference_mode(False), quietly(model), _uncompiled(), in_evaluation_mode(model):
        yield


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch on its device: a mapping by name, a sequence by position, else one argument."""
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{name: moved(value) for name, value in batch.items()})
    return model(*map(moved, batch if isinstance(batch, list | tuple) else [batch]))


def _uncompiled() -> AbstractContextManager[Any]:
    """No graphs of torch.compile."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return nullcontext()  # nothing was compiled, and the question would load the compiler
    return torch.compiler.set_stance("force_eager")
