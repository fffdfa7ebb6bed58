"""Weights with a LoRA adapter of PEFT's added: ``W_0 + s B A``, as merging it would give, in float32."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk._printable import listed
from lightning_qk.architecture.source_code import is_named
from lightning_qk.inspect.documents import BadInput, first_matches
from lightning_qk.inspect.matching import Load, Weights
from lightning_qk.inspect.storage import Get, Storage

_ROOT = "base_model.model."
_DOWN, _UP, _UP_BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"
_MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_EMBEDDED = {".lora_embedding_A", ".lora_embedding_B"}
_PARTS = (_DOWN, _UP, _UP_BIAS, *_MAGNITUDES, *_EMBEDDED)
_Parts = dict[str, str]
"""Part of a product → the tensor's key."""
_LARGEST_ALPHA = 1e30
# Fields that make weights depend on the input, or the adapter no product of low rank.
_REFUSED = (
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "monteclora_config",
    "target_parameters",
)
# Starts that leave the weights of the base as they are; others take the adapter's part out of them first.
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")


# PEFT's default.
_ALPHA = 8.0
# Fields that are read here, and what they have to be.
_KINDS: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str,),
    "revision": (str,),
    "lora_alpha": (int, float),
    "alpha_pattern": (dict,),
    "rank_pattern": (dict,),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "fan_in_fan_out": (bool,),
    "modules_to_save": (list,),
}


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raises for adapters that cannot be read.

    Raises:
        BadInput: no LoRA adapter, a variant that is not a product of low rank beside the base's weights, or
            a field is of a wrong kind.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise BadInput(
            f"expected a LoRA adapter, got {where} of type {kind}: merge it and pass the merged model"
        )
    for name, kinds in _KINDS.items():
        value = config.get(name)
        if value is not None and (
            not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        ):
            raise BadInput(
                f"expected {name} to be {' or '.join(one.__name__ for one in kinds)} in {where}, got "
                f"{type(value).__name__}: correct its adapter_config.json"
            )
    alphas = {"lora_alpha": config.get("lora_alpha"), **(config.get("alpha_pattern") or {})}
    for name, value in alphas.items():
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST_ALPHA
        ):
            raise BadInput(
                f"expected finite numbers for lora_alpha and alpha_pattern in {where}, got another value "
                f"for {name!r}: correct its adapter_config.json"
            )
    for name in _REFUSED:
        if config.get(name):
            raise BadInput(
                f"expected an adapter that adds a product of low rank to the base's weights, got {where} "
                f"with {name}={_short(config[name])}: merge it and pass the merged model"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and not start.lower().startswith(_HARMLESS_STARTS):
        raise BadInput(
            f"expected an adapter to the base's own weights, got {where} with "
            f"init_lora_weights={_short(start)}, which changes them first: merge it and pass the merged model"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


class AdaptedWeights:
    """The weights of a base with an adapter on some of them."""

    def __init__(
        self, base: Weights, model: nn.Module, storage: Storage, config: Mapping[str, Any], where: str
    ) -> None:
        """Find out which of a skeleton's parameters an adapter changes.

        Raises:
            BadInput: the adapter changes something that the model does not have, lacks half of a product, or holds
                tensors of an unknown kind.
        """
        self._base = base
        self._model = model
        self._storage = storage
        self._config = config
        self._where = where
        self._replaced: dict[str, str] = {}
        self._low_rank: dict[str, _Parts] = {}
        self._used: set[str] = set()
        self._heads: list[str] = []
        modules, names = dict(model.named_modules()), model.state_dict()
        prefix = f"{getattr(model, 'base_model_prefix', '')}."

        def own(path: str, known: Mapping[str, Any]) -> str | None:
            return next(
                (name for name in (path, prefix + path, path.removeprefix(prefix)) if name in known), None
            )

        if not storage.files:
            raise BadInput(f"expected an adapter's tensors in {where}, got none: save it again")
        strange: list[str] = []
        halves: list[str] = []
        found: dict[str, _Parts] = defaultdict(dict)
        for key in storage.files:
            path = key.removeprefix(_ROOT)
            part = next((part for part in _PARTS if path.endswith(part)), None)
            if part is not None:
                found[path.removesuffix(part)][part] = key
            elif (name := own(path, names)) is not None:
                self._replaced[name] = key  # a module that was trained whole
            elif self._is_head(path):
                self._heads.append(path)
            elif not self._is_embedding(path, own, modules):
                strange.append(path)
        for path, parts in found.items():
            module = own(path, modules)
            if not parts.keys() - _EMBEDDED and module is not None:
                continue  # no query or key weights: an embedding's
            is_known = module is not None and f"{module}.weight" in names and module not in self._low_rank
            if not is_known or (_UP_BIAS in parts and f"{module}.bias" not in names):
                strange += [path + part for part in parts]
            elif _DOWN not in parts:
                halves += parts.values()
            elif module is not None:
                self._low_rank[module] = parts
        if strange:
            raise BadInput(
                f"expected an adapter to this base, got {where} with {len(strange)} "
                f"tensor{'s' * (len(strange) > 1)} that a {type(model).__name__} does not have a place for "
                f"({listed(strange)}): pass the right one with --base, or merge the adapter and pass the "
                "merged model"
            )
        for module, parts in self._low_rank.items():
            if _UP not in parts:
                raise BadInput(
                    f"expected both factors of {module!r} in {where}, got no "
                    f"{parts[_DOWN].removesuffix(_DOWN)}{_UP}: save or download the adapter again"
                )
        if halves:
            raise BadInput(
                f"expected both factors of each product in {where}, got no first one beside "
                f"{listed(halves)}: save or download the adapter again"
            )
        given = config.get("alpha_pattern") or {}
        paths = {
            module: parts[_DOWN].removeprefix(_ROOT).removesuffix(_DOWN)
            for module, parts in self._low_rank.items()
        }
        matches = first_matches(given, paths.values(), where) if given else {}
        self._alphas = {
            module: given[matches[path]] for module, path in paths.items() if matches.get(path) is not None
        }

    def _is_head(self, path: str) -> bool:
        """Whether a tensor is in a module beside the network that the adapter's task added, such as ``score``."""
        saved = self._config.get("modules_to_save") or ()
        return path.partition(".")[0] in saved and not any(part.isdigit() for part in path.split("."))

    def _is_embedding(self, path: str, own: Any, modules: Mapping[str, Any]) -> bool:
        """Whether a tensor belongs to an embedding."""
        parts = path.split(".")
        found = (own(".".join(parts[:count]), modules) for count in range(len(parts) - 1, 0, -1))
        return isinstance(modules.get(next((name for name in found if name), "")), nn.Embedding)

    def has(self, name: str) -> bool:
        """Whether base or adapter hold a parameter."""
        return name in self._replaced or self._base.has(name)

    @contextmanager
    def reading(self) -> Iterator[Load]:
        """Within this block weights can be read; files are closed at its end."""
        with self._base.reading() as load, self._storage.reading() as get:

            def adapted(names: list[str], shape: torch.Size) -> Tensor:
                for name in names:
                    if name in self._replaced:
                        self._used.add(name)
                        return self._whole(name, get, shape)
                value = load(names, shape)
                for name in names:
                    module, _, own = name.rpartition(".")
                    if module not in self._low_rank:
                        continue
                    self._used.add(module)
                    if own == "weight":
                        return self._weight(value, module, get)
                    if own == "bias":
                        return self._bias(value, module, load, get)
                return value

            yield adapted

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that the checkpoint has of a parameter, without reading it; None where unknown."""
        return self._storage.shape(self._replaced[name]) if name in self._replaced else self._base.shape(name)

    def check_depth(self, layers: Collection[str]) -> None:
        """Raises BadInput for a base that has some of these attention layers and nothing of others."""
        self._base.check_depth(layers)

    def notes(self, layers: Collection[str]) -> list[str]:
        """Notes on tensors that were not read, and on an adapter that changes no attention."""
        notes = self._base.notes(layers)
        if not self._used:
            notes.append(
                f"the adapter {self._where} changes no query or key weights: these are the spectra of its base"
            )
        if self._heads:
            notes.append(
                f"{len(self._heads)} tensors of modules that the adapter's task added beside the network are "
                f"not read ({listed(self._heads)})"
            )
        return notes

    def _whole(self, name: str, get: Get, shape: torch.Size) -> Tensor:
        value = get(self._replaced[name])
        if value.shape != shape or not value.is_floating_point():
            raise BadInput(
                f"expected {name!r} of shape {tuple(shape)} as numbers in {self._where}, got "
                f"{tuple(value.shape)} as {str(value.dtype).removeprefix('torch.')}: pass the right base "
                "with --base"
            )
        return value.float()

    def _weight(self, weight: Tensor, module: str, get: Get) -> Tensor:
        down, up = (get(self._low_rank[module][part]) for part in (_DOWN, _UP))
        if down.dim() != 2 or up.dim() != 2 or up.shape[1] != down.shape[0] or not len(down):
            raise BadInput(
                f"expected two matrices of one rank for {module!r} in {self._where}, got shapes "
                f"{tuple(down.shape)} and {tuple(up.shape)}: save or download the adapter again"
            )
        if not (down.is_floating_point() and up.is_floating_point()):
            raise BadInput(
                f"expected an adapter that is kept as numbers, got {module!r} in {self._where} as "
                f"{str(down.dtype).removeprefix('torch.')}: dequantize it and save it again"
            )
        down, up = down.float(), up.float()
        # Stored as (in, out).
        turned = bool(self._config.get("fan_in_fan_out")) or is_named(
            self._model.get_submodule(module), "Conv1D"
        )
        weight = weight.T if turned else weight
        if up.shape[0] != weight.shape[0] or down.shape[1] != weight.shape[1]:
            raise BadInput(
                f"expected an adapter to a weight of shape {tuple(weight.shape)}, got one of shape "
                f"({up.shape[0]}, {down.shape[1]}) for {module!r}: pass the right base with --base"
            )
        weight = weight + self._scaling(module, down.shape[0]) * (up @ down)
        factor = self._factor(module, weight, get)
        weight = weight if factor is None else factor[:, None] * weight
        return weight.T if turned else weight

    def _bias(self, bias: Tensor, module: str, load: Load, get: Get) -> Tensor:
        parts = self._low_rank[module]
        if _UP_BIAS not in parts:
            return bias
        rank = get(parts[_DOWN]).shape[0]
        shift = self._scaling(module, rank) * get(parts[_UP_BIAS]).float()
        if shift.shape != bias.shape:
            raise BadInput(
                f"expected a bias of shape {tuple(bias.shape)} of {module!r} in {self._where}, got "
                f"{tuple(shift.shape)}: pass the right base with --base"
            )
        if parts.keys() & _MAGNITUDES:
            raise BadInput(
                f"expected DoRA without a bias of its own, got one for {module!r}: merge it and pass the "
                "merged model"
            )
        return bias + shift

    def _factor(self, module: str, weight: Tensor, get: Get) -> Tensor | None:
        """DoRA's factor of each row, or None."""
        parts = self._low_rank[module]
        key = next((parts[part] for part in _MAGNITUDES if part in parts), None)
        if key is None:
            return None
        size = get(key).float().flatten()
        if len(size) != len(weight):
            raise BadInput(
                f"expected {len(weight)} magnitudes of {module!r} in {self._where}, got {len(size)}: pass the "
                "right base with --base"
            )
        return size / weight.norm(dim=1)

    def _scaling(self, module: str, rank: int) -> float:
        own = self._config.get("lora_alpha")
        alpha = self._alphas.get(module, _ALPHA if own is None else own)
        return float(alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank)
