"""A model without its weights: built from a configuration, with parameters on the meta device.

Parameters have shapes and no memory. Buffers and whatever else a constructor computes (frequencies of rotary
positions, scales) are real, since layers are read by running parts of them; only tables of millions of entries are
not.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_qk._printable import one_line
from lightning_qk.architecture.source_code import is_named
from lightning_qk.inspect.documents import BadInput
from lightning_qk.inspect.matching import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Constructor → elements above which its tensor goes to the meta device; ranges are computed with.
_LARGEST = {
    **dict.fromkeys((torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn), 2**22),
    torch.arange: 2**25,
}
# Length of the pattern that stand-ins repeat: prime, so that no row of a matrix is like another.
_PATTERN = 4099


def build_skeleton(
    config: "PreTrainedConfig", *, trust: bool = False, tensors: int | None = None, size: int | None = None
) -> "PreTrainedModel":
    """Build the model that a configuration describes, without memory for its parameters.

    It is of the class that the configuration names (``architectures``), or of the one that ``AutoModel`` picks.

    Args:
        config: the configuration.
        trust: run the code that comes with the model, where its class is not in transformers.
        tensors: how many the checkpoint has: a model with far more parameters is not built to its end.
        size: bytes of the checkpoint: nor is one with a parameter that has far more numbers than that.

    Returns:
        The model in evaluation mode, its parameters on the meta device.

    Raises:
        BadInput: there is no such model, it cannot be built, or it is far larger than the checkpoint.
    """
    import transformers

    config = _plain_attention(config)
    named = getattr(config, "architectures", None) or []
    named = list(named) if isinstance(named, list | tuple) else []
    found = _class_of(config, named[0]) if named and isinstance(named[0], str) else None
    builders: list[Callable[[], Any]] = []
    if found is not None:
        builders.append(lambda: found._from_config(config, dtype=torch.float32))
    builders.append(
        lambda: transformers.AutoModel.from_config(config, trust_remote_code=trust, dtype=torch.float32)
    )
    problem: Exception | None = None
    for build in builders:
        try:
            with _without_memory(_Budget(tensors, size)), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = build()
        except BadInput:
            raise
        except Exception as error:  # a constructor may raise anything
            problem = problem or error
            continue
        return model.eval()
    assert problem is not None  # there is at least one builder
    kind = named[0] if named else getattr(config, "model_type", type(config).__name__)
    raise BadInput(
        f"expected a model that transformers can build from its config.json, got {kind}: {one_line(problem)}"
    ) from problem


def _class_of(config: "PreTrainedConfig", name: str) -> Any:
    """The class of transformers that a configuration names, of those that it does not export too."""
    import transformers

    homes: list[Any] = [transformers]
    with suppress(ImportError):
        homes.append(import_module(type(config).__module__.replace(".configuration_", ".modeling_")))
    for home in homes:
        found = getattr(home, name, None)
        # Not everything that is exported: functions have names too.
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return None


def _plain_attention(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Eager in place of an implementation that needs a library: attention is not run."""
    wanted = getattr(config, "_attn_implementation", None)
    if wanted not in (None, "eager", "sdpa"):
        config._attn_implementation = "eager"
    return config


class _Lean(TorchFunctionMode):
    """Puts large new tensors on the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        largest = _LARGEST.get(func)
        if largest is not None and kwargs.get("device") is None and kwargs.get("generator") is None:
            made = func(*args, **{**kwargs, "device": "meta"})
            if made.numel() > largest:
                return made
        return func(*args, **kwargs)


class _Budget:
    """Bounds on the size of a model, given its checkpoint.

    Layers may share tensors, constants need not be saved, and classes make what a checkpoint of another
    task lacks:
    the bounds are wide, and there only to end what would take memory or time without end.
    """

    def __init__(self, tensors: int | None, size: int | None) -> None:
        self._most = None if tensors is None else 64 * tensors + 4_000
        self._largest = 2**32 if size is None else max(2**24, 4 * size)
        self._count = 0

    def spend(self, name: str, parameter: Tensor) -> None:
        """Count a parameter.

        Raises:
            BadInput: there are too many, or it is too large.
        """
        self._count += 1
        if self._most is not None and self._count > self._most:
            raise BadInput(
                "expected a model of about as many parameters as the checkpoint has tensors, got one of more "
                f"than {self._most}: its configuration is that of another model"
            )
        if parameter.numel() > self._largest:
            raise BadInput(
                f"expected a model that its checkpoint can hold, got one with a {name!r} of shape "
                f"{tuple(parameter.shape)}: its configuration is that of another model"
            )


@contextmanager
def _without_memory(budget: _Budget) -> Iterator[None]:
    """Modules constructed in this block have their parameters on the meta device."""
    register = nn.Module.register_parameter

    def register_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            budget.spend(name, param)
        if param is not None and not param.is_meta:
            kept = {key: value for key, value in vars(param).items() if not key.startswith("_")}
            param = nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)
            vars(param).update(kept)
        register(self, name, param)

    nn.Module.register_parameter = register_meta  # type: ignore[method-assign]
    try:
        with _Lean(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Placed:
    """Stand-ins for a skeleton's tensors, until the end of the block.

    Attributes:
        names: of the parameters and buffers that have a stand-in.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        """Put stand-ins in the place of everything without values that some modules hold.

        Args:
            model: the skeleton.
            modules: parts of it; what is in them counts too.
        """
        paths = {id(module): path for path, module in model.named_modules()}
        # Shared parameters stay shared.
        self._made: dict[int, Tensor] = {}
        self._before: list[tuple[dict[str, Any], str, Tensor]] = []
        self._homes: dict[str, tuple[dict[str, Any], str]] = {}
        for top in modules:
            for module in top.modules():
                path = paths.get(id(module))
                if path is not None:
                    self._stand_in(module, path, direct=module is top or module in set(top.children()))

    @property
    def names(self) -> Collection[str]:
        """Qualified names of what has a stand-in."""
        return self._homes.keys()

    def names_of(self, tensor: Tensor) -> list[str]:
        """Qualified names of a stand-in: several where it is shared, none for other tensors."""
        return [name for name, (home, own) in self._homes.items() if home[own] is tensor]

    def shape(self, name: str) -> torch.Size:
        """The shape of a stand-in."""
        home, own = self._homes[name]
        return home[own].shape

    def put(self, name: str, value: Tensor) -> None:
        """Put values in the place of a stand-in, and of all that share it."""
        home, own = self._homes[name]
        old = home[own]
        new = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
        for other, key in self._homes.values():
            if other[key] is old:
                other[key] = new

    def __enter__(self) -> "Placed":
        return self

    def __exit__(self, *error: object) -> None:
        for home, own, old in reversed(self._before):
            home[own] = old
        self._before, self._homes, self._made = [], {}, {}

    def _stand_in(self, module: nn.Module, path: str, direct: bool) -> None:
        for home, own, name, tensor in _tensors(module, path):
            if tensor.is_meta:
                if id(tensor) not in self._made:
                    made = _stand_in(tensor, plain=direct and _is_plain_linear(module))
                    if isinstance(tensor, nn.Parameter):
                        made = nn.Parameter(made, requires_grad=False)
                    self._made[id(tensor)] = made
                self._before.append((home, own, tensor))
                home[own] = self._made[id(tensor)]
                self._homes[name] = (home, own)


def _tensors(module: nn.Module, path: str) -> list[tuple[dict[str, Any], str, str, Tensor]]:
    """A module's own parameters and buffers: where each is kept, its name there, its qualified name, itself."""
    homes: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    return [
        (home, own, f"{path}.{own}" if path else own, tensor)
        for home in homes
        for own, tensor in home.items()
        if tensor is not None
    ]


def fill(model: nn.Module, weights: Weights) -> list[str]:
    """Give a skeleton all its weights, in float32.

    Args:
        model: from :func:`build_skeleton`; it is a whole model then.
        weights: of the checkpoint.

    Returns:
        Names of the parameters that the checkpoint lacks, which are zero.

    Raises:
        BadInput: the checkpoint holds others.
    """
    missing: list[str] = []
    made: dict[int, Tensor] = {}
    with weights.reading() as load:
        for path, module in model.named_modules():
            for home, own, name, tensor in _tensors(module, path):
                is_stored = weights.has(name)
                if not (tensor.is_meta or (is_stored and tensor.is_floating_point())):
                    continue
                if id(tensor) not in made:
                    if not is_stored:
                        missing.append(name)
                    made[id(tensor)] = (
                        load([name], tensor.shape).clone()  # the files are closed afterwards
                        if is_stored
                        else torch.zeros(tensor.shape, dtype=tensor.dtype)
                    )
                value = made[id(tensor)]
                home[own] = (
                    nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
                )
    return missing


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether a module's function is known without running it."""
    return type(module).forward is nn.Linear.forward or is_named(module, "Conv1D")


def _stand_in(tensor: Tensor, *, plain: bool) -> Tensor:
    """Numbers around one for vectors, mixed ones for matrices; uninitialized memory where they are not used."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    if plain and tensor.dim() == 2:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    wave = torch.cos(1.7 * torch.arange(_PATTERN, dtype=torch.float32).square())
    wave = (1 + 0.2 * wave if tensor.dim() < 2 else 0.1 * wave).to(tensor.dtype)
    count = -(-tensor.numel() // _PATTERN)
    return wave.repeat(count)[: tensor.numel()].view(tensor.shape)
