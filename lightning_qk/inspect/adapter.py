"""Weights with a LoRA adapter of PEFT's added: ``W_0 + s B A``, as merging it would give, in float32."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.heads.classes import is_named
from lightning_qk.inspect.errors import BadInput
from lightning_qk.inspect.storage import Get, Storage
from lightning_qk.inspect.weights import Load, Weights

_ROOT = "base_model.model."
_DOWN, _UP, _UP_BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"
_MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
# What makes the weights depend on the input, or the adapter something else than a product of low rank.
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


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse adapters that are not read.

    Raises:
        BadInput: it is none of LoRA, or of a variant that is not a product of low rank beside the base's weights.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise BadInput(
            f"expected a LoRA adapter, got {where} of type {kind}: merge it and pass the merged model"
        )
    for name in _REFUSED:
        if config.get(name):
            raise BadInput(
                f"expected an adapter that adds a product of low rank to the base's weights, got {where} "
                "with "
                f"{name}={config[name]!r}: merge it and pass the merged model"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and not start.lower().startswith(_HARMLESS_STARTS):
        raise BadInput(
            f"expected an adapter to the base's own weights, got {where} with "
            f"init_lora_weights={start!r}, which "
            "changes them first: merge it and pass the merged model"
        )


class AdaptedWeights:
    """The weights of a base with an adapter on some of them."""

    def __init__(
        self, base: Weights, model: nn.Module, storage: Storage, config: Mapping[str, Any], where: str
    ) -> None:
        """Find out which of a skeleton's parameters an adapter changes.

        Raises:
            BadInput: the adapter changes something that the model does not have, or in an unknown way.
        """
        self._base = base
        self._model = model
        self._storage = storage
        self._config = config
        self._replaced: dict[str, str] = {}
        self._low_rank: dict[str, str] = {}
        modules, names = dict(model.named_modules()), model.state_dict()
        prefix = f"{getattr(model, 'base_model_prefix', '')}."

        def own(path: str, known: Mapping[str, Any]) -> str | None:
            return next(
                (name for name in (path, prefix + path, path.removeprefix(prefix)) if name in known), None
            )

        for key in storage.files:
            path = key.removeprefix(_ROOT)
            if path.endswith(_DOWN):
                module = own(path.removesuffix(_DOWN), modules)
                if module is None or f"{module}.weight" not in names:
                    raise BadInput(
                        f"expected an adapter to this base, got {where} that changes "
                        f"{path.removesuffix(_DOWN)!r}, which "
                        f"a {type(model).__name__} does not have: pass the right one with --base"
                    )
                self._low_rank[module] = key.removesuffix(_DOWN)
            elif ".lora_" not in path and (name := own(path, names)) is not None:
                self._replaced[name] = key  # a module that was trained whole

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
                        return get(self._replaced[name]).float()
                value = load(names, shape)
                for name in names:
                    module, _, own = name.rpartition(".")
                    if module not in self._low_rank:
                        continue
                    if own == "weight":
                        return self._weight(value, module, get)
                    if own == "bias":
                        return self._bias(value, module, load, get)
                return value

            yield adapted

    def _weight(self, weight: Tensor, module: str, get: Get) -> Tensor:
        prefix = self._low_rank[module]
        down, up = get(prefix + _DOWN).float(), get(prefix + _UP).float()
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
        prefix = self._low_rank[module]
        if prefix + _UP_BIAS not in self._storage.files:
            return bias
        rank = get(prefix + _DOWN).shape[0]
        shift = self._scaling(module, rank) * get(prefix + _UP_BIAS).float()
        if any(prefix + suffix in self._storage.files for suffix in _MAGNITUDES):
            raise BadInput(
                f"expected DoRA without a bias of its own, got one for {module!r}: merge it and pass the "
                "merged model"
            )
        return bias + shift

    def _factor(self, module: str, weight: Tensor, get: Get) -> Tensor | None:
        """What DoRA multiplies rows by."""
        prefix = self._low_rank[module]
        for suffix in _MAGNITUDES:
            if prefix + suffix in self._storage.files:
                return get(prefix + suffix).float().flatten() / weight.norm(dim=1)
        return None

    def _scaling(self, module: str, rank: int) -> float:
        alpha = self._config.get("lora_alpha") or 1
        for pattern, own in (self._config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = own
                break
        return alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank
