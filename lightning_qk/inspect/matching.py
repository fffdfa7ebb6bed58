"""The weights of a model without its weights, one parameter at a time, from the tensors of a checkpoint."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_qk._printable import listed, one_line
from lightning_qk.inspect.documents import BadInput
from lightning_qk.inspect.names import Origin, match_names
from lightning_qk.inspect.storage import Get, Storage

# Names of adapters' tensors: those of PEFT, loralib, torchtune and LyCORIS.
_ADAPTERS = re.compile(
    r"(?:^|[._])(?:lora|dora|hada|lokr|ia3|b?oft|vera|vblora|fourierft|hra|randlora)_|\.base_layer\."
)
_NUMBER = re.compile(r"\d+")
# Constants of attention, not weights, that older versions of transformers also saved.
_CONSTANTS = re.compile(r"(?:^|\.)(?:inv_freq|masked_bias|position_ids|relative_position_index)$")
_ALIGNMENT = 64
"""Bytes: torch's own tensors begin at a multiple of it."""


Load = Callable[[list[str], torch.Size], Tensor]
"""The values of a parameter, given all its names and its shape; float32 at least."""


class Weights(Protocol):
    """Weights that are read one parameter at a time."""

    def reading(self) -> AbstractContextManager[Load]:
        """Within this block weights can be read; files are closed at its end."""

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a parameter."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that the checkpoint has of a parameter, without reading it; None where unknown."""

    def check_depth(self, layers: Collection[str]) -> None:
        """Raises BadInput for a checkpoint that has some of these attention layers and nothing of others."""

    def notes(self, layers: Collection[str]) -> list[str]:
        """Notes on tensors that were not read, given the attention layers' names; call it after reading them."""


class StoredWeights:
    """The weights of a skeleton in the tensors of a checkpoint; a :class:`Weights`."""

    def __init__(
        self,
        storage: Storage,
        model: nn.Module,
        *,
        within: bool = False,
        prefix: str | None = None,
    ) -> None:
        """Match names.

        Args:
            storage: the checkpoint's tensors.
            model: the skeleton.
            within: the model is a part of the module that was saved, whose names it has in memory; else its names
                are those that ``from_pretrained`` knows, or, where they are not, such ones.
            prefix: only tensors whose names begin with it and a dot, without it.

        Raises:
            BadInput: the checkpoint holds nothing of the model, or nothing below the prefix.
        """
        self._storage, self._model = storage, model
        self._where = where = storage.where
        stored = list(storage.files)
        self._match = match_names(stored, model, where, within=within, prefix=prefix)
        self._ties = _tied(model)
        self._check_adapters(self._match.names)
        if not self._match.origins and any("flat_param" in name for name in stored):
            raise BadInput(
                f"expected tensors by name, got {where}, which holds those that FSDP makes of them: save it with "
                "FSDP.set_state_dict_type(model, StateDictType.FULL_STATE_DICT) instead"
            )
        if not self._match.origins:
            raise BadInput(
                f"expected the weights of a {type(model).__name__} in {where}, got none of its names among "
                f"{len(stored)} tensors (such as {', '.join(stored[:3]) or 'none'}): its configuration is "
                "that of another model"
            )

    def _check_adapters(self, keys: Iterable[str]) -> None:
        """Raises BadInput for adapters beside the weights that they change."""
        used = {key for origin in self._match.origins.values() for key, _ in origin.sources}
        found = [key for key in keys if key not in used and _ADAPTERS.search(key)]
        if found:
            raise BadInput(
                f"expected a checkpoint without adapters, got {self._where} with {len(found)} tensors of adapters "
                f"that are not merged into its weights ({listed(found)}): save what PEFT's "
                "model.merge_and_unload() gives, or the adapter with save_pretrained and pass its folder"
            )

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds the values of a parameter."""
        return self._origin([name]) is not None

    @contextmanager
    def reading(self) -> Iterator[Load]:
        """Within this block weights can be read; files are closed at its end."""
        with self._storage.reading() as get:
            yield lambda names, shape: self._load(names, get, shape)

    def _load(self, names: list[str], get: Get, shape: torch.Size) -> Tensor:
        """The values of a parameter as a model would load them, in float32 at least.

        Args:
            names: all that the parameter is called.
            get: reads a tensor of the checkpoint.
            shape: what the model expects.

        Raises:
            BadInput: they are not there, of another shape, or not numbers as they are.
        """
        origin = self._origin(names)
        if origin is None:
            raise BadInput(
                f"expected the weights {names[0]!r} in {self._where}, got no such tensor: the checkpoint is "
                "incomplete, or its configuration is that of another model"
            )
        value = self._converted(names, origin, get)
        if not value.is_floating_point() or value.element_size() < 2:
            raise BadInput(
                f"expected weights that are kept as numbers, got {names[0]!r} in {self._where} as "
                f"{str(value.dtype).removeprefix('torch.')} without scales: pass the model that it was made from"
            )
        if value.shape != shape:
            raise BadInput(
                f"expected {names[0]!r} of shape {tuple(shape)}, got {tuple(value.shape)} in {self._where}: "
                "its configuration is that of another model"
            )
        return _aligned(value if value.dtype == torch.float64 else value.float())

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that the checkpoint has of a parameter; None where unknown, or the tensor is converted."""
        origin = self._origin([name])
        return (
            None
            if origin is None or origin.converter is not None
            else self._storage.shape(origin.sources[0][0])
        )

    def check_depth(self, layers: Collection[str]) -> None:
        """Raises BadInput for a checkpoint that has some of these attention layers and nothing of others."""
        absent, present = [], 0
        for layer in layers:
            start = f"{layer}." if layer else ""
            names = [name for name, _ in self._model.get_submodule(layer).named_parameters()]
            if any(self.has(start + name) for name in names):
                present += 1
            elif names:
                absent.append(layer)
        if absent and present:
            raise BadInput(
                f"expected {present + len(absent)} attention layers, as the configuration says, in "
                f"{self._where}, got {present} (no tensor of {listed(absent)}): copy the rest, or correct "
                "the number of layers in the configuration"
            )

    def notes(self, layers: Collection[str]) -> list[str]:
        """Notes on tensors that are not read, given the names of the attention layers."""
        notes = []
        prefix, others, collisions = self._match.prefix, self._match.others, self._match.collisions
        if others:
            choose = " or ".join(f"--prefix {other}" for other in others[:5])
            notes.append(
                f"{self._where} holds {len(others) + 1} networks of this kind: read is the one "
                + (f"below {prefix!r}" if prefix else "whose names have no prefix")
                + f", not {listed(others)} (pass {choose} to read that)"
            )
        if collisions:
            notes.append(
                f"{len(collisions)} parameters have two tensors in {self._where}: read is the first, such as "
                f"{collisions[0][0]}, not {collisions[0][1]}"
            )
        if self._storage.decoded:
            notes.append(f"{self._where} is quantized: the numbers are those that its codes stand for")
        deeper, unknown = self._of_attention(layers)
        if deeper:
            is_expected = all(self._is_expected(f"{layer}.weight") for layer in deeper)
            notes.append(
                f"{self._where} is deeper than its configuration: {len(deeper)} attention "
                f"layer{'s' * (len(deeper) > 1)} that it holds ({listed(deeper)}) "
                f"{'are' if len(deeper) > 1 else 'is'} not read, only the {len(layers)} of the configuration"
                + ("" if is_expected else "; correct its number of layers to read all")
            )
        if unknown:
            notes.append(
                f"{len(unknown)} tensor{'s' * (len(unknown) > 1)} of attention in {self._where} "
                f"{'belong' if len(unknown) > 1 else 'belongs'} to no parameter of a "
                f"{type(self._model).__name__} and {'are' if len(unknown) > 1 else 'is'} not in these "
                f"numbers ({listed(unknown)})"
            )
        return notes

    def _of_attention(self, layers: Collection[str]) -> tuple[list[str], list[str]]:
        """Attention layers that are left over, and tensors that are in a layer that is read."""
        base = f"{getattr(self._model, 'base_model_prefix', '') or 'base'}."
        known = {layer: layer for layer in layers if layer}
        for layer in list(known):
            known.setdefault(layer.removeprefix(base), layer)
            known.setdefault(base + layer, layer)
        kinds = sorted({_NUMBER.sub("*", layer) for layer in known}, key=len, reverse=True)
        buffers = {name for name, _ in self._model.named_buffers()}
        deeper: dict[str, str] = {}
        unknown = []
        for name, key in self._match.left_over.items():
            if name in buffers or base + name in buffers or name.removeprefix(base) in buffers:
                continue
            if _CONSTANTS.search(name):
                continue
            kind = _NUMBER.sub("*", name)
            inside = next((own for own in kinds if kind.startswith(f"{own}.")), None)
            if inside is None:
                continue
            layer = ".".join(name.split(".")[: inside.count(".") + 1])
            if layer in known:
                if not self._is_expected(key):
                    unknown.append(key)
            else:
                deeper.setdefault(layer, key)
        return list(deeper), unknown

    def _is_expected(self, name: str) -> bool:
        """Whether the model's class says that tensors of that name may be left over."""
        patterns = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, name) for pattern in patterns)

    def _origin(self, names: Iterable[str]) -> Origin | None:
        for name in names:
            for own in (name, *self._ties.get(name, ())):
                if own in self._match.origins:
                    return self._match.origins[own]
        return None

    def _converted(self, names: list[str], origin: Origin, get: Get) -> Tensor:
        if origin.converter is None:
            return get(origin.sources[0][0])
        rule = deepcopy(origin.converter)
        for key, pattern in origin.sources:
            rule.add_tensor(origin.target, key, pattern, partial(get, key))
        try:
            made = rule.convert(origin.target, model=self._model, config=getattr(self._model, "config", None))
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(
                f"expected tensors that transformers can make {names[0]!r} of, got {self._where} "
                f"({one_line(error)}): the checkpoint is incomplete, or its configuration is that of another "
                "model"
            ) from error
        for name in names:
            if name in made:
                value = made[name]
                return value[0] if isinstance(value, list) else value
        raise BadInput(
            f"expected {names[0]!r} among what transformers makes of {origin.sources[0][0]!r}, got "
            f"{', '.join(made)}: convert the checkpoint with from_pretrained and save_pretrained"
        )


def _aligned(value: Tensor) -> Tensor:
    """The same tensor at an aligned address, as torch allocates it; a mapped file has tensors anywhere.

    Products of the same numbers differ in the last bit where they begin elsewhere, and two checkpoints with the
    same weights must not.
    """
    return value if value.data_ptr() % _ALIGNMENT == 0 else value.clone()


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Parameter name → others that hold the same values, one of which a checkpoint has."""
    ties: dict[str, list[str]] = defaultdict(list)
    known = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in known.items():
        ties[target].append(source)
        ties[source].append(target)
    same: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same[id(parameter)].append(name)
    for names in same.values():
        for name in names:
            ties[name] += [other for other in names if other != name]
    return ties
