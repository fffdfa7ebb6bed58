"""Read a run's record from its file, which may be damaged or made by somebody else.

Everything is compared with what it is said to be before anything is made of it: a record that was read
holds what a
monitor could have written.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_qk.record.history import HISTORIES, History, LayerShape, RunRecord
from lightning_qk.record.snapshots import Snapshots

_LARGEST_STEP = 2**53
_MOST_HEADS = 2**22
_WIDEST = 2**24
_LONGEST_TEXT = 2**16
"""Characters of one label, note or fact."""

Get = Callable[[str], Tensor]


class _Wrong(Exception):
    """What of a record is not what a monitor writes."""


def read_record(path: str | Path) -> RunRecord:
    """The record in a file.

    Args:
        path: what :meth:`RunRecord.save` wrote.

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
        pass  # tells what the system has against it
    known: set[str] = set()
    try:
        with safe_open(str(path), framework="pt") as file:
            known.update(file.keys())
            meta = json.loads((file.metadata() or {})["lightning_qk"])

            def get(name: str) -> Tensor:
                if name not in known:
                    _refuse(f"it lacks the tensor {name!r}")
                found: Tensor = file.get_tensor(name)
                return found

            if not isinstance(meta, dict):
                _refuse("its description is no object")
            yield meta, get
    except OSError:
        raise
    except _Wrong as error:
        raise ValueError(
            f"expected a whole record that a monitor wrote, got {path}, in which {error}: pass "
            f"another file from the "
            "run's log folder"
        ) from error
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"expected a record that a monitor wrote (lightning_qk_record.safetensors), got {path}: "
            "pass the file from the run's log folder"
        ) from error


def _refuse(why: str) -> NoReturn:
    raise _Wrong(why)


def _record(meta: dict[str, Any], get: Get) -> RunRecord:
    eigenvalues = {
        label: _complex(get(f"eigenvalues/{index}"), "its eigenvalues")
        for index, label in enumerate(_texts(meta.get("eigenvalues"), "the labels of its eigenvalues"))
    }
    step = meta.get("eigenvalues_step")
    record = RunRecord(
        eigenvalues=eigenvalues,
        eigenvalues_step=None if step is None else _whole(step, "the step of its eigenvalues"),
        scalars=_scalars(_object(meta.get("scalars"), "its curves")),
        info={
            _text(name, "a fact"): _text(value, "a fact")
            for name, value in _object(meta.get("info"), "its facts").items()
        },
        notes=_texts(meta.get("notes"), "its notes"),
        # What follows is younger than the format: records of earlier versions lack it.
        shapes=_shapes(_object(meta.get("shapes", {}), "its widths")),
        events=[
            (_whole(one[0], "the step of an event"), _text(one[1], "an event"))
            for one in _list(meta.get("events", []), "its events", of=2)
        ],
        points={
            _named_step(name): _text(value, "the name of a point")
            for name, value in _object(meta.get("points", {}), "its points").items()
        },
    )
    for kind, kept in _object(meta.get("snapshots", {}), "its snapshots").items():
        record.snapshots[kind] = _snapshots(kind, _object(kept, "its snapshots"), get)
    for group in HISTORIES:
        if group in meta:
            setattr(record, group, _history(group, _object(meta[group], f"its {group}"), get))
    return record


def _history(group: str, state: dict[str, Any], get: Get) -> History:
    what = f"the history of {group}"
    layers = _texts(state.get("layers"), f"the layers of {what}")
    heads = [
        _whole(one, f"the heads of {what}", least=1)
        for one in _list(state.get("heads"), f"the heads of {what}")
    ]
    steps = _steps(state.get("steps"), what)
    if len(layers) != len(heads) or len(set(layers)) != len(layers):
        _refuse(f"{what} has no number of heads for each layer")
    if sum(heads) > _MOST_HEADS:
        _refuse(f"{what} has {sum(heads)} heads")
    values = {}
    for name in _texts(state.get("statistics"), f"the statistics of {what}"):
        value = get(f"{group}/{name}")
        if value.shape != (len(steps), sum(heads)) or not value.is_floating_point():
            _refuse(f"{name} of {group} has the shape {tuple(value.shape)}, not {(len(steps), sum(heads))}")
        values[name] = value.float()
    states = get(f"states/{group}") if state.get("has_states") else None
    if states is not None and (states.shape != (len(steps), sum(heads)) or states.dtype != torch.int8):
        _refuse(f"the states of {what} have the shape {tuple(states.shape)} and the type {states.dtype}")
    reasons = _object(state.get("reasons", {}), f"the reasons of {what}")
    return History.from_state_dict(
        {
            "layers": layers,
            "heads": heads,
            "max_points": _whole(state.get("max_points"), f"the size of {what}", least=2),
            "steps": steps,
            "values": values,
            "stride": _whole(state.get("stride"), f"the stride of {what}", least=1),
            "seen": _whole(state.get("seen"), f"the count of {what}", least=0),
            "states": states,
            "reasons": {
                _text(label, f"a layer of {what}"): _text(reason, f"a reason of {what}")
                for label, reason in reasons.items()
            },
        }
    )


def _snapshots(kind: str, kept: dict[str, Any], get: Get) -> Snapshots:
    what = f"the snapshots of {kind}"
    steps, labels = _steps(kept.get("steps"), what), _list(kept.get("labels"), f"the labels of {what}")
    if len(steps) != len(labels):
        _refuse(f"{what} have no labels for each step")
    snapshots = Snapshots(max(_whole(kept.get("max_points"), f"the size of {what}", least=2), len(steps)))
    for point, (step, names) in enumerate(zip(steps, labels, strict=True)):
        values: dict[str, Tensor] = {}
        for index, label in enumerate(_texts(names, f"the labels of {what}")):
            name = f"snapshots/{kind}/{point}/{index}"
            if kind == "eigenvalues":
                values[label] = _complex(get(f"{name}/complex"), what)
            else:
                values[label] = _matrix(get(name), what)
        snapshots.append(step, values)
    snapshots.max_points = _whole(kept["max_points"], what, least=2)
    return snapshots


def _complex(value: Tensor, what: str) -> Tensor:
    if value.dim() != 3 or value.shape[-1] != 2 or not value.is_floating_point():
        _refuse(f"{what} have the shape {tuple(value.shape)}, not (heads, width, 2)")
    return torch.view_as_complex(value.float().contiguous())


def _matrix(value: Tensor, what: str) -> Tensor:
    if value.dim() != 2 or not value.is_floating_point():
        _refuse(f"{what} have the shape {tuple(value.shape)}, not (heads, bins)")
    return value


def _scalars(scalars: Mapping[str, Any]) -> dict[str, tuple[list[int], list[float]]]:
    out = {}
    for name, pair in scalars.items():
        what = f"the curve {name!r}"
        steps, values = _list([pair], what, of=2)[0]
        numbers = [_number(value, what) for value in _list(values, what)]
        places = [_whole(step, what) for step in _list(steps, what)]
        if len(places) != len(numbers):
            _refuse(f"{what} has {len(places)} steps for {len(numbers)} values")
        out[_text(name, what)] = (places, numbers)
    return out


def _shapes(shapes: Mapping[str, Any]) -> dict[str, LayerShape]:
    out = {}
    for label, shape in shapes.items():
        what = f"the widths of {label!r}"
        d_head, d_model, scaling = _list([shape], what, of=3)[0]
        d_head, d_model = _whole(d_head, what, least=1), _whole(d_model, what, least=1)
        if max(d_head, d_model) > _WIDEST:
            _refuse(f"{what} are {d_head} and {d_model}")
        out[_text(label, what)] = LayerShape(d_head, d_model, _number(scaling, what))
    return out


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(f"{what} are no object but {type(value).__name__}")
    return value


def _list(value: Any, what: str, of: int | None = None) -> list[Any]:
    """A list, of lists of a length where that is given."""
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
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or (math.isfinite(value) and abs(value) > 1e300)
    ):
        _refuse(f"{what} holds what is no number")
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
