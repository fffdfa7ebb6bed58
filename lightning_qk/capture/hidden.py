"""Capture of the hidden states before and behind transformer blocks, and of which tokens are padding.

Forward hooks are put on the blocks, and on the Hugging Face models around them for the mask of the tokens. They
return nothing and look at one boolean while nothing is captured. Inside a graph of torch.compile they are traced:
the boolean is a guard, so that a graph has one version that captures, and an operator hands the tensors out
(:mod:`lightning_qk.capture.hooks.compiled`).
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.capture import registry
from lightning_qk.capture.call import UnsupportedCallError, is_recomputation
from lightning_qk.capture.capture import Capture
from lightning_qk.capture.hooks import compiled, generate
from lightning_qk.capture.hooks.modules import Handle, hook_after, hook_before
from lightning_qk.heads.sites import PADDING, takes_padding

HiddenListener = Callable[[str, Tensor, Tensor | None], None]

_MASKS = PADDING | {"attention_mask"}

OUTPUT, INPUT, MASK, TOKENS = "output", "input", "mask", "tokens"
"""What a hook hands on: hidden states behind and before a block; a mask, and the tokens that a model is given."""

_library = torch.library.Library("lightning_qk", "FRAGMENT")
_library.define(
    "hidden(Tensor(a!) order, Tensor? module, str kind, Tensor? tensor) -> ()", tags=compiled.graph_tags
)


class _State:
    """Read by every hook: whether a capture is enabled, and whether one is installed, which graphs guard."""

    def __init__(self) -> None:
        self.capturing = False
        self.traced = False


STATE = _State()
_captures: "tuple[HiddenCapture, ...]" = ()
_OTHER_MASK = torch.zeros((), device="cpu")
"""In place of a mask that is not one number a token."""


class HiddenCapture(Capture):
    """Hands the hidden states of some blocks to a listener, while enabled.

    Use :meth:`install` once the network is built, :attr:`enabled` to switch, and :meth:`remove` when done.

    Args:
        outputs: the blocks whose outputs are wanted, and the name of each. The first tensor of an output counts.
        inputs: the blocks whose inputs are wanted, and the name of each. Of a block that is run several times
            within its model (shared layers) only the first input counts.
        models: block → modules around it, nearest first, and maybe itself. The mask of its tokens is the
            two-dimensional ``attention_mask`` of the nearest one that is given one, or the opposite of what
            torch's encoders and their parts are given as padding; where the nearest model is given None, there is
            none.
        turned: blocks whose states are ``(tokens, batch, width)`` → true; None where that is not known, so that
            they are handed on only where the shape of their mask tells.
        listener: called with the name, the states ``(batch, n, d)`` and the mask ``(batch, n)``, boolean, or None,
            with autograd off, in the thread of the forward. It must not modify the states, nor keep them.
        model: what the blocks are part of, asked whether it was compiled before.
        generated: called with the name, in place of the listener, for forwards within transformers'
            ``generate``. None: they are handed on as all others.
        every_run: hand on the inputs of every run of a block within its model.

    Attributes:
        problems: name → why its states are not captured any more.
        seen: names of what was handed on at least once.
        unmasked: names whose mask is not known, so that all tokens count.
    """

    _what = "hidden states"

    def __init__(
        self,
        outputs: Mapping[nn.Module, str],
        listener: HiddenListener,
        *,
        inputs: Mapping[nn.Module, str] | None = None,
        models: Mapping[nn.Module, Sequence[nn.Module]] | None = None,
        turned: Mapping[nn.Module, bool | None] | None = None,
        model: nn.Module | None = None,
        generated: Callable[[str], None] | None = None,
        every_run: bool = False,
    ) -> None:
        super().__init__(model, generated)
        inputs, models = inputs or {}, models or {}
        self._blocks = list({**outputs, **inputs})  # keeps the ids valid
        self._names = {(id(module), OUTPUT): name for module, name in outputs.items()}
        self._names |= {(id(module), INPUT): name for module, name in inputs.items()}
        self._first = list(inputs)
        # Those that take a mask.
        self._models = {
            id(block): [owner for owner in owners if not _MASKS.isdisjoint(_parameters(owner))]
            for block, owners in models.items()
        }
        self._turned = {id(block): order for block, order in (turned or {}).items()}
        self._listener = listener
        self._every_run = every_run
        self._masks: dict[int, Tensor | None] = {}
        self._sizes: dict[int, tuple[int, ...]] = {}
        self._entered: set[int] = set()
        self.unmasked: set[str] = set()

    def _switched(self) -> None:
        # A mask of a batch before would be a wrong one.
        self._masks.clear()
        self._sizes.clear()
        self._entered.clear()
        with registry.lock:
            STATE.capturing = any(capture.enabled for capture in _captures)
            STATE.traced = bool(_captures)

    def _install(self, undo: list[Callable[[], None]]) -> None:
        global _captures
        compiled.drop_graphs(self._model)
        owners = {id(owner): owner for part in self._models.values() for owner in part}
        if self._generated is not None:
            undo.extend(generate.patch_generate(self._model))
        # Before the inputs: a module may be given its tokens' mask itself.
        undo.extend(_hook(owner, MASK) for owner in owners.values())
        undo.extend(_hook(module, OUTPUT) for module in self._blocks if (id(module), OUTPUT) in self._names)
        undo.extend(_hook(module, INPUT) for module in self._first)
        self._label((*self._blocks, *owners.values()), undo)
        _captures = (*_captures, self)
        self.enabled = self._enabled

    def _discard(self) -> None:
        global _captures
        _captures = tuple(other for other in _captures if other is not self)
        self._switched()

    def receive(self, module: nn.Module, kind: str, tensor: Tensor | None) -> None:
        """Take what one hook hands on."""
        if not self._enabled:
            return
        if kind == TOKENS:
            self._sizes[id(module)] = () if tensor is None else tuple(tensor.shape[:2])
        elif kind == MASK:
            self._receive_mask(module, tensor)
        else:
            self._receive_states(module, kind, tensor)

    def _receive_mask(self, module: nn.Module, tensor: Tensor | None) -> None:
        if tensor is not None and tensor.dim() == 2:
            # Its own copy: a graph may write into the memory.
            tensor = tensor.detach().to(torch.bool, copy=True)
        elif tensor is not None:
            tensor = _OTHER_MASK
        self._masks[id(module)] = tensor
        for block, owners in self._models.items():
            if any(owner is module for owner in owners):
                self._entered.discard(block)

    def _receive_states(self, module: nn.Module, kind: str, tensor: Tensor | None) -> None:
        name = self._names.get((id(module), kind))
        if name is None or name in self.problems or self._is_generated(name):
            return
        if kind == INPUT and not self._every_run and self._models.get(id(module)):
            if id(module) in self._entered:
                return
            self._entered.add(id(module))
        with self._keeping_problems(name):
            states, mask = self._read(module, name, tensor)
            self._listener(name, states, mask)
            self.seen.add(name)

    def _read(self, module: nn.Module, name: str, tensor: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if tensor is None:
            raise UnsupportedCallError(
                "no tensor of hidden states is found in what the block is given or gives"
            )
        if hasattr(tensor, "to_local"):
            raise UnsupportedCallError(
                "its hidden states are sharded over processes (sequence parallel), and no process has them whole"
            )
        if tensor.is_nested and tensor.layout == torch.strided:
            # torch's encoder in evaluation: padding is gone, and the longest sequence may be shorter.
            lengths = torch.tensor([len(one) for one in tensor.unbind()], device=tensor.device)
            states = torch.nested.to_padded_tensor(tensor.detach(), 0.0)
            return states, torch.arange(states.shape[1], device=tensor.device) < lengths[:, None]
        if tensor.dim() != 3 or not tensor.is_floating_point():
            raise UnsupportedCallError(
                f"its hidden states are {tensor.dtype} of shape {tuple(tensor.shape)}, not floating (batch, "
                "tokens, width)"
            )
        turned = self._turned.get(id(module), False)
        states = tensor.detach().transpose(0, 1) if turned else tensor.detach()
        size, other = tuple(states.shape[:2]), (states.shape[1], states.shape[0])
        is_unknown = False
        for owner in self._models.get(id(module), ()):
            is_torchs = takes_padding(owner)
            mask = self._masks.get(id(owner), None if is_torchs else _OTHER_MASK)
            if mask is None and is_torchs:
                continue  # models around it may know more
            if mask is None or mask.shape == size or (mask.shape == other and not turned):
                shape = self._sizes.get(id(owner)) if mask is None else tuple(mask.shape)
                if turned is None and (shape not in (size, other) or size == other):
                    break
                is_other = shape == other != size and not turned
                return (states.transpose(0, 1) if is_other else states), mask
            is_unknown = True
        if turned is None:
            raise UnsupportedCallError(
                "its nn.MultiheadAttention takes (tokens, batch, width), and whether the block does is not known: "
                "pass batch_first=True"
            )
        if is_unknown:
            self.unmasked.add(name)
        return states, None


# Hooks.


_hooked: dict[tuple[int, str], tuple[Handle, list[object]]] = {}
"""Hooks, and one object for each of their users."""


def _hook(module: nn.Module, kind: str) -> Callable[[], None]:
    """Hook a module once for all users; returns what takes the hook away when the last of them calls theirs."""
    key = (id(module), kind)
    if key not in _hooked:
        if kind == OUTPUT:
            handle = hook_after(module, _after_block)
        elif kind == INPUT:
            handle = hook_before(module, _before_block)
        else:
            handle = hook_before(module, functools.partial(_before_model, _parameters(module)))
        _hooked[key] = handle, []
    _hooked[key][1].append(key)

    def undo() -> None:
        handle, users = _hooked[key]
        users.pop()
        if not users:
            del _hooked[key]
            handle.remove()

    return undo


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, by position."""
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return ()


def _is_wanted() -> bool:
    """Whether a hook hands anything on; in a graph, whether it does on some steps. Traced."""
    if torch.compiler.is_dynamo_compiling():
        return compiled.is_read(STATE)
    return STATE.capturing


def _after_block(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if _is_wanted():
        _hand_on(module, OUTPUT, _first_states(output))


def _before_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _is_wanted():
        given = kwargs.get("hidden_states")
        if given is None:
            given = _first_states(args)
        if given is None:
            given = _first_states(tuple(kwargs.values()))
        _hand_on(module, INPUT, given)


def _before_model(
    names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if _is_wanted():
        tokens = None
        for name in ("input_ids", "inputs_embeds"):
            value = _argument(name, names, args, kwargs)
            if isinstance(value, Tensor):
                tokens = value
                break
        _hand_on(module, TOKENS, tokens)
        _hand_on(module, MASK, _mask_of(names, args, kwargs))


def _mask_of(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The mask of tokens that a module is given. Traced."""
    if "attention_mask" not in names:
        for name in sorted(PADDING.intersection(names)):
            mask = _argument(name, names, args, kwargs)
            if isinstance(mask, Tensor):
                # Inside of torch's layers it is a number that is added to logits.
                return ~mask if mask.dtype == torch.bool else mask == 0
        return None
    mask = _argument("attention_mask", names, args, kwargs)
    if mask is not None and not isinstance(mask, Tensor):
        return torch.zeros((), device="cpu")  # a dictionary of masks, a BlockMask
    return mask


def _argument(name: str, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name in kwargs:
        return kwargs[name]
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else None


def _first_states(value: Any) -> Tensor | None:
    """The first floating tensor of an output or of arguments. Traced by torch.compile."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for part in value:
            if isinstance(part, Tensor) and part.is_floating_point():
                return part
    return None


def _hand_on(module: nn.Module, kind: str, tensor: Tensor | None) -> None:
    """Give a tensor to all captures. Traced by torch.compile, where it becomes an operator."""
    if torch.compiler.is_dynamo_compiling():
        identity = compiled.identity(module)
        if identity is not None:
            torch.ops.lightning_qk.hidden(compiled.ORDER, identity, kind, tensor)
    elif not torch.compiler.is_compiling():
        _deliver(module, kind, tensor)


@torch.compiler.disable
def _deliver(module: nn.Module, kind: str, tensor: Tensor | None) -> None:
    if not STATE.capturing or is_recomputation():
        return
    with torch.no_grad():
        for capture in _captures:
            capture.receive(module, kind, tensor)


@torch.compiler.disable
def _emit(order: Tensor, module: Tensor | None, kind: str, tensor: Tensor | None) -> None:
    owner = None if module is None else compiled.module_of(module)
    if owner is not None:
        _deliver(owner, kind, tensor)


compiled.implement(_library, "hidden", _emit, STATE)
