"""σReparam: weights of attention as a trained gain times a matrix of spectral norm one."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_qk.architecture.source_code import is_named
from lightning_qk.capture.call import is_recomputation
from lightning_qk.functional.precision import at_least_float32
from lightning_qk.functional.singular import leading_singular
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.interventions.head_scaler import head_scalers
from lightning_qk.interventions.layers import matching_layers

Projections = Literal["query_key", "all"]

_ORIGINAL, _GAIN, _PLAIN = "parametrizations.weight.original", "parametrizations.weight.0.gain", "weight"
_STATE = (_ORIGINAL, *(f"parametrizations.weight.0.{name}" for name in ("gain", "u", "v", "part")))


class SigmaParametrization(nn.Module):
    """``W = γ W̃ / σ₁(W̃)`` for parts of a weight, each with a γ of its own.

    σ₁ is ``uᵀ W̃ v``: u and v follow by one power iteration before each training forward, and the gradient goes
    through σ₁ with u and v held. γ is trained and starts at σ₁.

    Args:
        weight: as it is stored, of two dimensions.
        part: which part each row (or column) belongs to, −1 for none: shape ``(rows, 1)`` or ``(1, columns)``.

    Attributes:
        gain: γ, ``(parts,)``.
    """

    gain: nn.Parameter
    u: Tensor
    v: Tensor
    part: Tensor

    def __init__(self, weight: Tensor, part: Tensor) -> None:
        super().__init__()
        self.register_buffer("part", part)
        found = _decompose(weight, part)
        self.gain = nn.Parameter(found["gain"])
        self.register_buffer("u", found["u"])
        self.register_buffer("v", found["v"])

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight."""
        return _effective(weight, self.gain, self.u.clone(), self.v.clone(), self.part)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The tensor to store for an effective weight: the weight itself, with γ at its σ₁."""
        for name, value in _decompose(weight, self.part).items():
            getattr(self, name).data.copy_(value)
        return weight

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """One power iteration."""
        with torch.autocast(weight.device.type, enabled=False):
            wide = at_least_float32(weight.detach()).to(self.u.dtype)
            members = (self.part.flatten() == _numbers(self.gain)[:, None]).to(wide)
            by_row = self.part.shape[1] == 1
            u = self.v @ wide.mT
            u = nn.functional.normalize(u * members if by_row else u, dim=1)
            v = u @ wide
            v = nn.functional.normalize(v if by_row else v * members, dim=1)
            # A part of zeros, or one that is not finite, keeps its vectors.
            usable = (u.norm(dim=1) > 0.5) & (v.norm(dim=1) > 0.5)
            self.u.copy_(torch.where(usable[:, None], u, self.u))
            self.v.copy_(torch.where(usable[:, None], v, self.v))


def add_sigma_reparam(
    model: nn.Module,
    *,
    modules: str | Sequence[str] | None = None,
    projections: Projections = "query_key",
    trained: bool = True,
) -> list[str]:
    r"""Reparametrize attention weights as ``W = γ W̃ / σ₁(W̃)``, with γ trained, in place.

    After Zhai et al. 2023 (arXiv 2303.06296; apple/ml-sigma-reparam [V]): with its spectral norms held by single
    numbers, attention's entropy cannot collapse in few steps. γ starts at σ₁(W), so that the model computes what
    it computed before. Queries and keys have one γ each, also where one weight holds both; the rows of values
    in it stay plain. In latent attention it is what expands the latents that is reparametrized.

    Call it before an optimizer is created: ``weight`` of such a projection is no longer a parameter, but computed
    from ``parametrizations.weight.original`` and ``…weight.0.gain``. State dicts have these keys, and the
    buffers ``u``, ``v`` and ``part``, instead of ``weight``. A plain state dict can be loaded all the same (γ is
    then σ₁), and :func:`plain_state_dict` makes one. Each training forward is one power iteration; under
    gradient checkpointing the recomputation does not iterate.

    Args:
        model: any module that contains Hugging Face transformers; its weights are whole and plain.
        modules: glob pattern or patterns on qualified names of attention layers; None for all.
        projections: ``"query_key"``, or ``"all"`` for every linear map inside the attention layers (of a fused
            one, values have a γ too).
        trained: frozen weights are refused; else their γ is frozen as well, and may be unfrozen with them.

    Returns:
        Qualified names of the projections that were reparametrized.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: patterns match no layer, an unknown choice, or weights that are no plain trainable parameters
            of their own (adapters, quantization, sharding, other parametrizations).
    """
    if projections not in ("query_key", "all"):
        raise ValueError(f"expected projections to be 'query_key' or 'all', got {projections!r}")
    reader = ProjectionReader(model)
    names = matching_layers(reader, modules)
    # Of every row of a projection, which part it belongs to.
    parts: dict[nn.Module, Tensor] = {}
    transposed: dict[nn.Module, bool] = {}
    for name, editor in head_scalers(reader, names, trained=trained).items():
        for stored in (editor.query, editor.key):
            projection, weight = stored.projection, stored.weight
            if reader.is_sharded(name) or not projection.is_submodule or weight.dim() != 2:
                raise ValueError(
                    f"expected whole weights of linear maps in {name}, got the {tuple(weight.shape)} weight "
                    f"{projection.name!r}, sharded or a parameter of the layer itself: leave it out with modules="
                )
            part = parts.setdefault(projection.module, torch.full((projection.rows,), -1))
            part[stored.places.flatten()] = int(part.max()) + 1
            transposed[projection.module] = stored.transposed
        if projections == "all":
            for module in reader.layers[name].module.modules():
                _add_rest(module, parts, transposed)
    found = {module: name for name, module in model.named_modules()}
    for module, part in parts.items():
        _parametrize(module, part.view(1, -1) if transposed[module] else part.view(-1, 1))
    return [found[module] for module in parts]


def remove_sigma_reparam(model: nn.Module) -> list[str]:
    """Turn the weights that act into plain ones; create optimizers again afterwards.

    Args:
        model: one that :func:`add_sigma_reparam` was called on; others are left as they are.

    Returns:
        Qualified names of the projections that were changed.
    """
    names = []
    for name, module in list(model.named_modules()):
        if is_sigma_reparametrized(module):
            changed: Any = module
            trained = changed.parametrizations["weight"].original.requires_grad
            for hooks in (module._forward_pre_hooks, module._load_state_dict_pre_hooks):
                for key, hook in list(hooks.items()):
                    if getattr(hook, "hook", hook) in (_iterate, _load_plain):
                        del hooks[key]
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            changed.weight.requires_grad_(trained)
            names.append(name)
    return names


def sigma_gains(model: nn.Module) -> dict[str, Tensor]:
    """Qualified name of each reparametrized projection → its γ, ``(parts,)``."""
    gains = {}
    for name, module in model.named_modules():
        if is_sigma_reparametrized(module):
            held: Any = module.parametrizations
            gains[name] = held["weight"][0].gain
    return gains


def is_sigma_reparametrized(module: nn.Module) -> bool:
    """Whether a module's own weight is under σReparam."""
    if not parametrize.is_parametrized(module, "weight"):
        return False
    held: Any = module.parametrizations
    return isinstance(held["weight"][0], SigmaParametrization)


def plain_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of a reparametrized model as one of the plain model, whose weights act the same.

    Args:
        state_dict: of a model, or of a checkpoint under ``"state_dict"``; plain entries are kept.

    Returns:
        A new dict; the order of the keys is kept, ``weight`` where ``original`` was.
    """
    plain: dict[str, Any] = {}
    for key, value in state_dict.items():
        prefix = key.removesuffix(_ORIGINAL)
        if prefix != key and prefix + _GAIN in state_dict:
            rest = (state_dict[prefix + name] for name in _STATE[1:])
            plain[prefix + _PLAIN] = _effective(value.detach(), *(tensor.detach() for tensor in rest))
        elif not any(key.endswith(name) and key.removesuffix(name) + _GAIN in state_dict for name in _STATE):
            plain[key] = value
    return plain


def _add_rest(module: nn.Module, parts: dict[nn.Module, Tensor], transposed: dict[nn.Module, bool]) -> None:
    """One part for all rows of a linear map that have none yet."""
    is_conv = is_named(module, "Conv1D")
    weight = module._parameters.get("weight")
    if not (is_conv or isinstance(module, nn.Linear)) or weight is None or weight.dim() != 2:
        return
    transposed.setdefault(module, is_conv)
    part = parts.setdefault(module, torch.full((weight.shape[int(transposed[module])],), -1))
    part[part < 0] = int(part.max()) + 1


def _parametrize(module: nn.Module, part: Tensor) -> None:
    weight: Any = module.weight
    made = SigmaParametrization(weight, part.to(weight.device))
    made.train(module.training)
    made.gain.requires_grad_(weight.requires_grad)
    parametrize.register_parametrization(module, "weight", made)
    module.register_forward_pre_hook(_iterate)
    module.register_load_state_dict_pre_hook(_load_plain)


def _iterate(module: nn.Module, inputs: object) -> None:
    # The recomputation of a checkpoint has to use the weights of its forward.
    if module.training and is_sigma_reparametrized(module) and not _is_recomputed():
        held: Any = module.parametrizations
        if held["weight"].original.requires_grad:
            held["weight"][0].iterate(held["weight"].original)


@torch.compiler.assume_constant_result
def _is_recomputed() -> bool:
    return is_recomputation()


def _load_plain(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
) -> None:
    """Let a plain weight be loaded: γ becomes its σ₁."""
    weight = state_dict.get(prefix + _PLAIN)
    if weight is None or prefix + _ORIGINAL in state_dict or not is_sigma_reparametrized(module):
        return
    held: Any = module.parametrizations
    part = held["weight"][0].part
    if weight.shape == held["weight"].original.shape:
        found = _decompose(weight.detach().to(part.device), part)
        state_dict.update(
            {f"{prefix}parametrizations.weight.0.{name}": value for name, value in found.items()}
        )
        state_dict[f"{prefix}parametrizations.weight.0.part"] = part
    state_dict[prefix + _ORIGINAL] = state_dict.pop(prefix + _PLAIN)


def _decompose(weight: Tensor, part: Tensor) -> dict[str, Tensor]:
    """γ, u and v of a plain weight."""
    count = int(part.max()) + 1
    by_row = part.shape[1] == 1
    dtype = at_least_float32(weight).dtype
    left = torch.zeros(count, weight.shape[0], dtype=dtype, device=weight.device)
    right = torch.zeros(count, weight.shape[1], dtype=dtype, device=weight.device)
    for number in range(count):
        places = (part.flatten() == number).nonzero()[:, 0]
        own = weight.detach()[places] if by_row else weight.detach()[:, places]
        _, u, v = leading_singular(own)
        if by_row:
            left[number, places], right[number] = u, v
        else:
            left[number], right[number, places] = u, v
    # As the forward computes it, so that the first weight is bit-identical.
    return {"gain": _sigma(weight.detach(), left, right), "u": left, "v": right}


def _sigma(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return ((u @ at_least_float32(weight).to(u.dtype)) * v).sum(1)


def _effective(weight: Tensor, gain: Tensor, u: Tensor, v: Tensor, part: Tensor) -> Tensor:
    with torch.autocast(weight.device.type, enabled=False):
        scale = gain / _sigma(weight, u, v)
        return (weight * torch.cat([scale.new_ones(1), scale])[part + 1]).to(weight.dtype)


def _numbers(gain: Tensor) -> Tensor:
    return torch.arange(len(gain), device=gain.device)
