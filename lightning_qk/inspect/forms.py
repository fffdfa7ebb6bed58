"""Weights that a checkpoint keeps in another form than as one matrix: factors, or codes with scales.

Tensors of a module that make up one weight are shown as that weight, which is made when it is read. A form that is
not known is shown too, and refused when it is read: a checkpoint may hold it where it does not matter.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_qk._printable import one_line
from lightning_qk.inspect import codes
from lightning_qk.inspect.documents import BadInput
from lightning_qk.inspect.foreign import instead_of
from lightning_qk.inspect.quantization import PLAIN, Quantization
from lightning_qk.inspect.storage import Get, Storage
from lightning_qk.interventions import plain_state_dict

Shape = tuple[int, ...]
Make = Callable[[Mapping[str, Tensor], Quantization], Tensor]

# Scales of activations and of caches, which no weight depends on.
_OF_ACTIVATIONS = re.compile(
    r"(?:^|\.)(?:(?:input|output|activation|[qkv])_(?:scale|zero_point|global_scale|scale_ub))$"
)


@dataclass(frozen=True)
class Form:
    """How several tensors of a module make one weight.

    Attributes:
        name: of the form, for messages.
        ending: of the name of a tensor that no other form has.
        anchor: pattern of that name; its group ``own`` is the name of the weight where that varies.
        parts: the other tensors, as ``make`` calls them → name, where ``{own}`` is the name of the weight.
        make: the weight of them; None for a form that is not read.
        optional: tensors that may be there too.
        like: the part that has the shape of the weight, or the shape by those of the parts.
        codes: whether numbers are kept as codes.
    """

    name: str
    ending: str
    anchor: str
    parts: Mapping[str, str]
    make: Make | None
    optional: tuple[str, ...] = ()
    like: str | Callable[[Mapping[str, Shape], Quantization], Shape] | None = None
    codes: bool = False


def _weight_norm(parts: Mapping[str, Tensor], quantization: Quantization) -> Tensor:
    """``g v / |v|``, norms over the dimensions that ``g`` does not have (Salimans and Kingma 2016)."""
    direction, gain = (_matrix(parts[name], name) for name in ("direction", "gain"))
    if gain.dim() == 0:
        return direction * (gain / direction.norm())
    along = [dim for dim, size in enumerate(gain.shape) if size == 1]
    if gain.dim() != direction.dim() or any(
        size != direction.shape[dim] for dim, size in enumerate(gain.shape) if size > 1
    ):
        raise ValueError(f"it has gains {tuple(gain.shape)} for a weight {tuple(direction.shape)}")
    return direction * (gain / torch.linalg.vector_norm(direction, dim=along, keepdim=True))


def _spectral_norm(parts: Mapping[str, Tensor], quantization: Quantization) -> Tensor:
    """``W / uᵀ W v``, as the layer computes it in evaluation (Miyato et al. 2018)."""
    weight, left, right = (_matrix(parts[name], name) for name in ("weight", "left", "right"))
    if weight.dim() != 2 or left.shape != weight.shape[:1] or right.shape != weight.shape[1:]:
        raise ValueError(
            f"it has vectors {tuple(left.shape)} and {tuple(right.shape)} for a weight {tuple(weight.shape)}"
        )
    return weight / torch.dot(left, weight @ right)


def _pruned(parts: Mapping[str, Tensor], quantization: Quantization) -> Tensor:
    weight, mask = _matrix(parts["weight"], "weight"), parts["mask"].float()
    if weight.shape != mask.shape:
        raise ValueError(f"it has a mask {tuple(mask.shape)} for a weight {tuple(weight.shape)}")
    return weight * mask


def _sigma_reparam(parts: Mapping[str, Tensor], quantization: Quantization) -> Tensor:
    """``γ W / σ₁(W)`` for each part of the rows (or columns), as the model computes it."""
    part, gain, weight = parts["part"], _matrix(parts["gain"], "gain"), _matrix(parts["weight"], "weight")
    whole = not part.is_floating_point() and part.numel() > 0
    if not whole or not -1 <= int(part.min()) <= int(part.max()) < len(gain):
        raise ValueError("its rows belong to parts that have no gain")
    if (
        weight.dim() != 2
        or part.dim() != 2
        or any(size not in (1, weight.shape[dim]) for dim, size in enumerate(part.shape))
    ):
        raise ValueError(f"it has parts {tuple(part.shape)} for a weight {tuple(weight.shape)}")
    start = "parametrizations.weight"
    names = {"weight": "original", "gain": "0.gain", "u": "0.u", "v": "0.v", "part": "0.part"}
    given = {f"{start}.{names[name]}": value for name, value in parts.items()}
    wide = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
    (made,) = plain_state_dict(wide).values()
    return made


def _matrix(value: Tensor, name: str) -> Tensor:
    if not value.is_floating_point() or value.element_size() < 2:
        raise ValueError(f"its {name} is kept as {str(value.dtype).removeprefix('torch.')}")
    return value if value.dtype == torch.float64 else value.float()


_PARAMETRIZED = r"parametrizations\.(?P<own>\w+)"
_OWN = r"(?P<own>\w*weight)"
_STACKED = "parametrizations.{own}"
_FORMS = (
    Form(
        "SigmaReparam",
        ".0.gain",
        rf"{_PARAMETRIZED}\.0\.gain",
        {"gain": f"{_STACKED}.0.gain", "weight": f"{_STACKED}.original"}
        | {name: f"{_STACKED}.0.{name}" for name in ("u", "v", "part")},
        _sigma_reparam,
        like="weight",
    ),
    Form(
        "weight normalization",
        ".original0",
        rf"{_PARAMETRIZED}\.original0",
        {"gain": f"{_STACKED}.original0", "direction": f"{_STACKED}.original1"},
        _weight_norm,
        like="direction",
    ),
    Form(
        "weight normalization",
        "weight_g",
        rf"{_OWN}_g",
        {"gain": "{own}_g", "direction": "{own}_v"},
        _weight_norm,
        like="direction",
    ),
    Form(
        "spectral normalization",
        ".0._u",
        rf"{_PARAMETRIZED}\.0\._u",
        {"left": f"{_STACKED}.0._u", "right": f"{_STACKED}.0._v", "weight": f"{_STACKED}.original"},
        _spectral_norm,
        like="weight",
    ),
    Form(
        "spectral normalization",
        "weight_u",
        rf"{_OWN}_u",
        {"left": "{own}_u", "right": "{own}_v", "weight": "{own}_orig"},
        _spectral_norm,
        like="weight",
    ),
    Form(
        "pruning",
        "weight_mask",
        rf"{_OWN}_mask",
        {"mask": "{own}_mask", "weight": "{own}_orig"},
        _pruned,
        like="weight",
    ),
    Form(
        "a parametrization",
        ".original",
        rf"{_PARAMETRIZED}\.original",
        {"original": f"{_STACKED}.original"},
        None,
    ),
    Form("a reparametrization", "weight_orig", rf"{_OWN}_orig", {"original": "{own}_orig"}, None),
)


def _of_names(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _by_method(parts: Mapping[str, Tensor], quantization: Quantization) -> Tensor:
    if quantization.method not in ("gptq", "awq"):
        raise ValueError("its configuration does not say whether its codes are those of GPTQ or of AWQ")
    return (codes.awq if quantization.method == "awq" else codes.gptq)(parts, quantization)


_CODED = (
    Form(
        "GPTQ or AWQ",
        "qweight",
        "qweight",
        _of_names("qweight", "qzeros", "scales"),
        _by_method,
        ("g_idx",),
        codes.word_shape,
        True,
    ),
    Form(
        "compressed-tensors",
        "weight_packed",
        "weight_packed",
        _of_names("weight_packed", "weight_scale", "weight_shape"),
        codes.packed,
        ("weight_zero_point", "weight_g_idx"),
        None,
        True,
    ),
    *(
        Form(
            "a scale",
            scale,
            scale,
            _of_names("weight", scale),
            codes.scaled,
            ("weight_zero_point",),
            "weight",
            True,
        )
        for scale in ("weight_scale_inv", "weight_scale")
    ),
    *(
        Form(
            "bitsandbytes",
            kind,
            rf"weight\.quant_state\.{kind}",
            _of_names("weight", f"weight.quant_state.{kind}", "weight.absmax", "weight.quant_map"),
            codes.four_bits,
            ("weight.nested_absmax", "weight.nested_quant_map"),
            None,
            True,
        )
        for kind in ("bitsandbytes__nf4", "bitsandbytes__fp4")
    ),
    Form(
        "bitsandbytes",
        "SCB",
        "SCB",
        _of_names("weight", "SCB"),
        codes.eight_bits,
        ("weight_format",),
        "weight",
        True,
    ),
    Form("HQQ", "W_q", "W_q", {"codes": "W_q"}, None, codes=True),
    Form("quanto", "weight._data", r"weight\._data", {"codes": "weight._data"}, None, codes=True),
    Form("torchao", "weight_qdata", "_?weight_qdata", {"codes": "weight_qdata"}, None, codes=True),
)


@dataclass(frozen=True)
class _Group:
    """Tensors that make one weight.

    Attributes:
        form: how.
        parts: as ``form.make`` calls them → their names.
        refused: why they are not read, or empty.
    """

    form: Form
    parts: Mapping[str, str]
    refused: str = ""


def as_weights(
    storage: Storage, quantization: Quantization = PLAIN, *, known: Collection[str] = ()
) -> Storage:
    """A checkpoint whose weights are shown as such, whatever form each of them is kept in.

    Args:
        storage: the checkpoint.
        quantization: what its configuration says.
        known: names of the model's own parameters; a form that the model has itself is left.
    """
    groups, used = _grouped(list(storage.files), known)
    if quantization.method:
        used |= {name for name in storage.files if _OF_ACTIVATIONS.search(name)}
    return _FormStorage(storage, groups, used, quantization) if groups or used else storage


def _grouped(names: list[str], known: Collection[str]) -> tuple[dict[str, _Group], set[str]]:
    """Weights that several tensors make up, and the names of all those tensors."""
    own_forms = {_end(name) for name in known if "parametrizations." in name or name.endswith("weight_g")}
    inside: dict[str, set[str]] = defaultdict(set)
    stored = set(names)
    groups: dict[str, _Group] = {}
    used: set[str] = set()
    found = []
    for form in (*_FORMS, *_CODED):
        pattern = re.compile(rf"(?P<module>(?:.+\.)?){form.anchor}")
        for name in names:
            match = pattern.fullmatch(name) if name.endswith(form.ending) else None
            if match is not None and not (own_forms and _end(name) in own_forms):
                found.append((form, match["module"], match.groupdict().get("own") or "weight"))
    modules = {module for _, module, _ in found}
    for name in names if modules else ():
        place = name.rfind(".")
        while place >= 0:
            if name[: place + 1] in modules:
                inside[name[: place + 1]].add(name[place + 1 :])
            place = name.rfind(".", 0, place)
        if "" in modules:
            inside[""].add(name)
    for form, module, own in found:
        whole = module + own
        parts = {one: module + name.format(own=own) for one, name in form.parts.items()}
        if whole in groups or (form.make is None and parts.keys() and set(parts.values()) & used):
            continue
        lacking = [name for name in parts.values() if name not in stored]
        if lacking and form.name == "weight normalization":
            continue  # other things are called so
        parts |= {name: module + name for name in form.optional if module + name in stored}
        extra = _extra(inside[module], own, form) - {name.removeprefix(module) for name in parts.values()}
        refused = ""
        if form.make is None:
            refused = "its formula is not known"
        elif lacking:
            refused = f"it lacks {lacking[0]}"
        elif extra:
            refused = f"it also holds {module}{min(extra)}"
        groups[whole] = _Group(form, parts, refused)
        used |= set(parts.values()) | {module + name for name in extra}
    return groups, used


def _end(name: str) -> str:
    """The last parts of the path of a module that a name's tensor is in."""
    parts = re.split(r"\.parametrizations\.|\.\w+$", name)[0].split(".")
    return ".".join(parts[-2:])


def _extra(inside: Collection[str], own: str, form: Form) -> set[str]:
    """Tensors of a module that have to do with a weight."""
    return {
        name
        for name in inside
        if name == own
        or name.startswith((f"{own}_", f"{own}.", f"parametrizations.{own}."))
        or (form.codes and "." not in name and name != "bias" and not _OF_ACTIVATIONS.search(name))
    }


class _FormStorage(Storage):
    """The weights that several tensors of a checkpoint make, beside its other tensors."""

    def __init__(
        self, storage: Storage, groups: Mapping[str, _Group], used: set[str], quantization: Quantization
    ) -> None:
        names = [name for name in storage.files if name not in used]
        super().__init__(dict.fromkeys([*names, *groups], Path(storage.where)), storage.where)
        self._storage = storage
        self._groups = groups
        self._quantization = quantization

    def path(self, name: str) -> Path | None:
        """The file of a tensor, or of the first of those that make it."""
        group = self._groups.get(name)
        return self._storage.path(name if group is None else next(iter(group.parts.values())))

    def size(self) -> int | None:
        """Bytes of all files together."""
        return self._storage.size()

    def shape(self, name: str) -> Shape | None:
        """The shape of a tensor, or of what several make."""
        group = self._groups.get(name)
        if group is None:
            return self._storage.shape(name)
        like = group.form.like
        if like is None or group.refused:
            return None
        if isinstance(like, str):
            return self._storage.shape(group.parts[like])
        shapes = {one: self._storage.shape(part) for one, part in group.parts.items()}
        there = {one: shape for one, shape in shapes.items() if shape is not None}
        try:
            return like(there, self._quantization) if len(there) == len(shapes) else None
        except ValueError:
            return None  # reported when it is read

    @contextmanager
    def reading(self) -> Iterator[Get]:
        """Within this block tensors can be read."""
        with self._storage.reading() as get:

            def made(name: str) -> Tensor:
                group = self._groups.get(name)
                if group is None:
                    return get(name)
                if group.refused or group.form.make is None:
                    raise self._refusal(name, group, group.refused)
                parts = {one: get(part) for one, part in group.parts.items()}
                self.decoded |= group.form.codes
                try:
                    return group.form.make(parts, self._quantization)
                except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
                    raise self._refusal(name, group, one_line(error)) from error

            yield made

    def _refusal(self, name: str, group: _Group, why: str) -> BadInput:
        return BadInput(
            f"expected a weight {name!r} that can be read, got it in {self.where} in the form of "
            f"{group.form.name}, where {why}: {_instead(group.form)}"
        )


def _instead(form: Form) -> str:
    return (
        instead_of(form.name)
        if form.codes
        else "remove the parametrization in the program that made it, and save the state_dict again"
    )
