"""The file of a run's record: one safetensors file, which may be damaged or of another program.

The header's JSON has what is small, tensors the rest. Reading compares every part with what it should be: a record
that was read holds what a monitor could have written.
"""

import errno
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_qk.record.atomic_write import whole_file

_PLAIN = ("eigenvalues_step", "scalars", "events", "info", "notes", "shapes", "points")
_LARGEST_STEP = 2**53
_MOST_HEADS = 2**22
_WIDEST = 2**24
_LONGEST_TEXT = 2**16
"""Characters of one label, note or fact."""

Get = Callable[[str], Tensor]


class _Wrong(Exception):
    """What a record holds that no monitor writes."""


def write_record(path: str | Path, state: Mapping[str, Any]) -> Path:
    """Write a record.

    Args:
        path: the file; it appears whole or not at all.
        state: fields of a :class:`~lightning_qk.record.RunRecord`, histories and snapshots as their state dicts.

    Raises:
        OSError: it cannot be written there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    meta: dict[str, Any] = {"eigenvalues": list(state["eigenvalues"])}
    meta |= {name: state[name] for name in _PLAIN} | {"snapshots": {}}
    # Copies: layers may be views of one batched tensor, which safetensors refuses.
    tensors = {
        f"eigenvalues/{index}": _real(value.to("cpu", torch.complex64))
        for index, value in enumerate(state["eigenvalues"].values())
    }
    for group, history in state["histories"].items():
        rest = dict(history)
        values, states = rest.pop("values"), rest.pop("states")
        meta[group] = {**rest, "statistics": list(values), "has_states": states is not None}
        if states is not None:
            tensors[f"states/{group}"] = states.contiguous()
        tensors |= {f"{group}/{name}": value.contiguous() for name, value in values.items()}
    for kind, kept in state["snapshots"].items():
        meta["snapshots"][kind] = {
            "max_points": kept["max_points"],
            "steps": kept["steps"],
            "labels": [list(values) for values in kept["values"]],
        }
        for point, values in enumerate(kept["values"]):
            for index, value in enumerate(values.values()):
                suffix = "/complex" if value.is_complex() else ""
                tensors[f"snapshots/{kind}/{point}/{index}{suffix}"] = _real(value)
    path = Path(path)
    with whole_file(path) as partial:
        try:
            save_file(tensors, partial, metadata={"lightning_qk": json.dumps(meta)})
        except SafetensorError as error:  # how it reports a full disk, for one
            raise OSError(errno.EIO, str(error), str(path)) from error
    return path


def _real(value: Tensor) -> Tensor:
    plain = torch.view_as_real(value) if value.is_complex() else value
    return plain.clone(memory_format=torch.contiguous_format)


def read_record(path: str | Path) -> dict[str, Any]:
    """Read and check what :func:`write_record` wrote.

    Raises:
        ValueError: the file is no such record, or is damaged.
        OSError: it cannot be read.
    """
    with _opened(Path(path)) as (meta, get):
        return _record(meta, get)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, Any], Get]]:
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):
        pass  # raises what the system has against it
    try:
        with safe_open(str(path), framework="pt") as file:
            known = set(file.keys())
            meta = json.loads((file.metadata() or {})["lightning_qk"])

            def get(name: str) -> Tensor:
                if name not in known:
                    _refuse(f"it lacks the tensor {name!r}")
                found: Tensor = file.get_tensor(name)
                return found

            yield _object(meta, "its description"), get
    except OSError:
        raise
    except _Wrong as error:
        raise ValueError(
            f"expected a whole record that a monitor wrote, got {path}, in which {error}: pass another file from "
            "the run's log folder"
        ) from error
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"expected a record that a monitor wrote (lightning_qk_record.safetensors), got {path}: "
            "pass the file from the run's log folder"
        ) from error


def _refuse(why: str) -> NoReturn:
    raise _Wrong(why)


def _record(meta: dict[str, Any], get: Get) -> dict[str, Any]:
    step = meta.get("eigenvalues_step")
    # Snapshots and what follows them are younger than the format: records of earlier versions lack them.
    return {
        "eigenvalues": {
            label: _complex(get(f"eigenvalues/{index}"), "its eigenvalues")
            for index, label in enumerate(_texts(meta.get("eigenvalues"), "the labels of its eigenvalues"))
        },
        "eigenvalues_step": None if step is None else _whole(step, "the step of its eigenvalues"),
        "scalars": {
            _text(name, "a curve"): _curve(pair, f"the curve {name!r}")
            for name, pair in _object(meta.get("scalars"), "its curves").items()
        },
        "info": {
            _text(name, "a fact"): _text(value, "a fact")
            for name, value in _object(meta.get("info"), "its facts").items()
        },
        "notes": _texts(meta.get("notes"), "its notes"),
        "snapshots": {
            kind: _snapshots(kind, _object(kept, "its snapshots"), get)
            for kind, kept in _object(meta.get("snapshots", {}), "its snapshots").items()
        },
        "shapes": {
            _text(label, "a label"): _shape(shape, f"the widths of {label!r}")
            for label, shape in _object(meta.get("shapes", {}), "its widths").items()
        },
        "events": [
            (_whole(one[0], "the step of an event"), _text(one[1], "an event"))
            for one in _list(meta.get("events", []), "its events", of=2)
        ],
        "points": {
            _named_step(name): _text(value, "the name of a point")
            for name, value in _object(meta.get("points", {}), "its points").items()
        },
        "histories": {
            group: _history(group, _object(state, f"its {group}"), get)
            for group, state in meta.items()
            if group not in ("eigenvalues", "snapshots", *_PLAIN)
        },
    }


def _history(group: str, state: dict[str, Any], get: Get) -> dict[str, Any]:
    what = f"the history of {group}"
    layers = _texts(state.get("layers"), f"the layers of {what}")
    counts = _list(state.get("heads"), f"the heads of {what}")
    heads = [_whole(one, f"the heads of {what}", least=1) for one in counts]
    steps = _steps(state.get("steps"), what)
    if len(layers) != len(heads) or len(set(layers)) != len(layers):
        _refuse(f"{what} has no number of heads for each layer")
    if sum(heads) > _MOST_HEADS:
        _refuse(f"{what} has {sum(heads)} heads")

    def table(name: str, is_right: Callable[[Tensor], bool]) -> Tensor:
        value = get(name)
        if value.shape != (len(steps), sum(heads)) or not is_right(value):
            _refuse(
                f"{name} is {value.dtype} of the shape {tuple(value.shape)}, not {(len(steps), sum(heads))}"
            )
        return value

    return {
        "layers": layers,
        "heads": heads,
        "max_points": _whole(state.get("max_points"), f"the size of {what}", least=2),
        "steps": steps,
        "values": {
            name: table(f"{group}/{name}", torch.is_floating_point).float()
            for name in _texts(state.get("statistics"), f"the statistics of {what}")
        },
        "stride": _whole(state.get("stride"), f"the stride of {what}", least=1),
        "seen": _whole(state.get("seen"), f"the count of {what}", least=0),
        "states": table(f"states/{group}", lambda value: value.dtype == torch.int8)
        if state.get("has_states")
        else None,
        "reasons": {
            _text(label, f"a layer of {what}"): _text(reason, f"a reason of {what}")
            for label, reason in _object(state.get("reasons", {}), f"the reasons of {what}").items()
        },
    }


def _snapshots(kind: str, kept: dict[str, Any], get: Get) -> dict[str, Any]:
    what = f"the snapshots of {kind}"
    steps, labels = _steps(kept.get("steps"), what), _list(kept.get("labels"), f"the labels of {what}")
    if len(steps) != len(labels):
        _refuse(f"{what} have no labels for each step")
    values = []
    for point, names in enumerate(labels):
        places = {
            label: f"snapshots/{kind}/{point}/{index}"
            for index, label in enumerate(_texts(names, f"the labels of {what}"))
        }
        if kind == "eigenvalues":
            values.append({label: _complex(get(f"{place}/complex"), what) for label, place in places.items()})
        else:
            values.append({label: _matrix(get(place), what) for label, place in places.items()})
    size = _whole(kept.get("max_points"), f"the size of {what}", least=2)
    return {"max_points": size, "steps": steps, "values": values}


def _complex(value: Tensor, what: str) -> Tensor:
    if value.dim() != 3 or value.shape[-1] != 2 or not value.is_floating_point():
        _refuse(f"{what} have the shape {tuple(value.shape)}, not (heads, width, 2)")
    return torch.view_as_complex(value.float().contiguous())


def _matrix(value: Tensor, what: str) -> Tensor:
    if value.dim() != 2 or not value.is_floating_point():
        _refuse(f"{what} have the shape {tuple(value.shape)}, not (heads, bins)")
    return value


def _curve(pair: Any, what: str) -> tuple[list[int], list[float]]:
    steps, values = _list([pair], what, of=2)[0]
    numbers = [_number(value, what) for value in _list(values, what)]
    places = [_whole(step, what) for step in _list(steps, what)]
    if len(places) != len(numbers):
        _refuse(f"{what} has {len(places)} steps for {len(numbers)} values")
    return places, numbers


def _shape(shape: Any, what: str) -> tuple[int, int, float]:
    d_head, d_model, scaling = _list([shape], what, of=3)[0]
    widths = _whole(d_head, what, least=1), _whole(d_model, what, least=1)
    if max(widths) > _WIDEST:
        _refuse(f"{what} are {d_head} and {d_model}")
    return *widths, _number(scaling, what)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(f"{what} are no object but {type(value).__name__}")
    return value


def _list(value: Any, what: str, of: int | None = None) -> list[Any]:
    """A list; with ``of`` each entry is a list of that length."""
    if not isinstance(value, list):
        _refuse(f"{what} are no list but {type(value).__name__}")
    if of is not None and not all(isinstance(one, list) and len(one) == of for one in value):
        _refuse(f"{what} are no lists of {of}")
    return value


def _texts(value: Any, what: str) -> list[str]:
    return [_text(one, what) for one in _list(value, what)]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        _refuse(f"{what} is no text but {type(value).__name__}")
    if len(value) > _LONGEST_TEXT:
        _refuse(f"{what} has {len(value)} characters")
    return value.encode("utf-8", "backslashreplace").decode()  # halves of surrogate pairs cannot be written


def _whole(value: Any, what: str, least: int = -_LARGEST_STEP) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST_STEP:
        _refuse(f"{what} is no whole number from {least} on")
    return value


def _number(value: Any, what: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (math.isfinite(value) and abs(value) > 1e300):
        _refuse(f"{what} holds something that is not a number")
    return float(value)


def _steps(value: Any, what: str) -> list[int]:
    steps = [_whole(step, f"a step of {what}") for step in _list(value, f"the steps of {what}")]
    if any(later <= earlier for earlier, later in pairwise(steps)):
        _refuse(f"{what} has steps out of order")
    return steps


def _named_step(name: str) -> int:
    if not name.removeprefix("-").isdecimal() or len(name) > 16:
        _refuse(f"{name!r} is no step")
    return int(name)
