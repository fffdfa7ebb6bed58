"""What the processes of a job decide together, so that none waits for another that has given up.

Whatever is computed on one process may fail there alone: memory, a disk, LAPACK. A collective call that is left
out by one process makes the others wait until the backend's timeout. So a measurement has three parts: what each
process does for itself, a word among all of them on whether it worked, and the collective calls, which are made by
all or by none.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_qk.callbacks._trainer import describe_error

_K = TypeVar("_K")
_T = TypeVar("_T")
_M = TypeVar("_M", bound=Metric)


class FailedTogether(RuntimeError):
    """Something failed on at least one process, and is given up on all of them; raised on each."""


def reason_of(error: Exception) -> str:
    """Why something was given up, in one line: of one process, or as agreed on by all."""
    return str(error) if isinstance(error, FailedTogether) else describe_error(error)


def is_distributed(trainer: Trainer) -> bool:
    """Whether there are other processes to agree with; the same on all of them."""
    distributed = torch.distributed
    return trainer.world_size > 1 and distributed.is_available() and distributed.is_initialized()


def has_others() -> bool:
    """As :func:`is_distributed`, where no trainer is at hand."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def agree(trainer: Trainer, error: Exception | None = None, *, facts: str = "") -> None:
    """Raise on every process where one of them brings an error; a collective call.

    Args:
        trainer: the trainer.
        error: what failed here; None where nothing did.
        facts: what has to be the same on every process for the collective calls that follow.

    Raises:
        FailedTogether: naming the first process that failed; or the facts differ.
        Exception: ``error``, where there is one process.
    """
    if not is_distributed(trainer):
        if error is not None:
            raise error
        return
    if isinstance(error, FailedTogether):
        raise error  # agreed on already
    own = digest(facts)
    word = torch.tensor([int(error is not None), own, -own], device=device_of(trainer))
    torch.distributed.all_reduce(word, op=torch.distributed.ReduceOp.MAX)
    failed, largest, smallest = word.tolist()
    if failed:
        raise failed_together(every_process(trainer, error and describe_error(error)), error)
    if largest != -smallest:
        raise FailedTogether("the attention layers are not the same on every process")


def device_of(trainer: Trainer) -> torch.device:
    """Where the tensors of collective calls have to be."""
    return trainer.strategy.root_device


def failed_together(texts: Sequence[str | None], cause: Exception | None) -> FailedTogether:
    """What is raised on every process where some have failed.

    Args:
        texts: of each process what has failed there, or None; one at least.
        cause: what has failed on this one, if anything.
    """
    rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
    error = FailedTogether(f"{text}, in process {rank} of {len(texts)}")
    error.__cause__ = cause
    return error


def all_or_none(
    trainer: Trainer, action: Callable[[], _T], *, facts: Callable[[_T], str] | None = None
) -> _T:
    """What an action without collective calls returns, if it worked on every process; a collective call.

    Args:
        trainer: the trainer.
        action: what each process does for itself.
        facts: what of its result has to be the same on every process.

    Raises:
        FailedTogether: it failed on one of several processes.
        Exception: whatever it raised, where there is one process.
    """
    try:
        result = action()
        said = "" if facts is None else facts(result)
    except Exception as error:
        agree(trainer, error)
        raise  # not reached: agree raises
    agree(trainer, facts=said)
    return result


def finish_together(trainer: Trainer, action: Callable[[], _T]) -> _T:
    """What an action returns that may make collective calls, if it worked on every process; a collective call.

    Of the action's own failures only :class:`FailedTogether` may come before its last collective call.

    Raises:
        FailedTogether: it failed on one of several processes.
        Exception: whatever it raised, where there is one process.
    """
    return finish_with(lambda error: agree(trainer, error), action)


def finish_with(finish: Callable[[Exception | None], None], action: Callable[[], _T]) -> _T:
    """As :func:`finish_together`, with whatever agrees on the error in place of :func:`agree`."""
    try:
        result = action()
    except FailedTogether:
        raise
    except Exception as error:
        finish(error)
        raise  # not reached: it raises
    finish(None)
    return result


def all_agree(trainer: Trainer, is_well: bool) -> bool:
    """Whether all is well on every process; a collective call."""
    if not is_distributed(trainer):
        return is_well
    return bool(trainer.strategy.reduce_boolean_decision(is_well, all=True))


def from_zero(trainer: Trainer, value: Any) -> Any:
    """What rank zero has, on all ranks; a collective call."""
    return trainer.strategy.broadcast(value) if is_distributed(trainer) else value


def total(trainer: Trainer, values: Tensor) -> Tensor:
    """Sum over ranks, in place; a collective call. The shape is the same on all of them."""
    if is_distributed(trainer):
        torch.distributed.all_reduce(values)
    return values


def gathered(trainer: Trainer, values: Tensor) -> list[Tensor]:
    """The values of every rank, of one shape, in their order; a collective call."""
    if not is_distributed(trainer):
        return [values]
    every = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every, values)
    return every


def alone(metric: _M) -> _M:
    """Keep a metric from reducing its states when it is computed: :func:`reduce_packed` does it."""
    metric.sync_on_compute = False
    metric._to_sync = False
    return metric


def reduce_packed(trainer: Trainer, metrics: Sequence[Metric], words: Sequence[float]) -> Tensor:
    """Reduce the states of several metrics over all processes, in place, and find the largest of some numbers.

    Two collective calls, whatever the number of metrics: one for all sums, one for all maxima. Nothing of the
    result is looked at, so that no device is waited for.

    Args:
        trainer: the trainer.
        metrics: with states of the same shapes on every process, which are sums or maxima.
        words: as many on every process, exact in float64.

    Returns:
        The largest of each word, on the device.
    """
    device = device_of(trainer)
    found = torch.tensor(words, dtype=widest(device), device=device)
    if not is_distributed(trainer):
        return found
    kinds = {"dim_zero_sum": torch.distributed.ReduceOp.SUM, "dim_zero_max": torch.distributed.ReduceOp.MAX}
    for kind, operation in kinds.items():
        states = [state for metric in metrics for state in _states(metric, kind, kinds)]
        given = [state.reshape(-1).to(device) for state in states]
        if kind == "dim_zero_max":
            given.append(found)
        if not given:
            continue
        # Of the widest type among them.
        table = torch.cat(given)
        torch.distributed.all_reduce(table, op=operation)
        parts = table.split([part.numel() for part in given])
        for state, part in zip(states, parts, strict=False):
            state.copy_(part.view_as(state))
        if kind == "dim_zero_max":
            found = parts[-1]
    return found


def widest(device: torch.device) -> torch.dtype:
    """The type that holds numbers of all others on a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def _states(metric: Metric, wanted: str, known: Iterable[str]) -> list[Tensor]:
    """The states of a metric that are reduced in one way."""
    found = []
    for name, reduction in metric._reductions.items():
        kind = getattr(reduction, "__name__", "")
        if kind not in known:
            raise ValueError(
                f"expected states that are sums or maxima, got {name} of {type(metric).__name__}: give it "
                "dist_reduce_fx='sum' or 'max'"
            )
        if kind == wanted:
            found.append(getattr(metric, name))
    return found


def digest(facts: str) -> int:
    """A number of 48 bits, exact in float64, that differs where the facts do."""
    return int.from_bytes(hashlib.sha256(facts.encode()).digest()[:6], "big")


def combine(trainer: Trainer, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The largest of each number over all processes; a collective call.

    Args:
        trainer: the trainer.
        rows: whole numbers, as many on every process.
    """
    if not is_distributed(trainer) or not rows:
        return [list(row) for row in rows]
    table = torch.tensor([list(row) for row in rows], dtype=torch.int64, device=device_of(trainer))
    torch.distributed.all_reduce(table, op=torch.distributed.ReduceOp.MAX)
    return table.tolist()


def failed_anywhere(trainer: Trainer, names: Sequence[str], reasons: Mapping[str, str]) -> dict[str, str]:
    """Name → reason, of those that some process has one for, the same names on all of them; a collective call.

    The reasons of other processes are asked for only where there is one: else it is one small reduction.

    Args:
        trainer: the trainer.
        names: all that may fail, the same on every process.
        reasons: of those that failed here.
    """
    if not is_distributed(trainer):
        return {name: reason for name, reason in reasons.items() if name in names}
    flags = combine(trainer, [(int(name in reasons),) for name in names])
    if not any(flag for (flag,) in flags):
        return {}
    every = first_of_each(every_process(trainer, dict(reasons)))
    return {name: every[name] for name, (flag,) in zip(names, flags, strict=True) if flag}


def every_process(trainer: Trainer, value: Any) -> list[Any]:
    """What each process brings, in their order; a collective call."""
    if not is_distributed(trainer):
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def first_of_each(found: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Name → reason, from the first process that has one, of what :func:`every_process` found."""
    out: dict[str, str] = {}
    for own in reversed(found):
        out |= own
    return out


def fill_from_others(trainer: Trainer, values: dict[_K, Tensor]) -> dict[_K, Tensor]:
    """The mean over the processes that have a finite value, the same on all of them; a collective call.

    For values that every process computes of the same numbers, each by itself: where one could not, it takes the
    others'. Values that are finite nowhere stay as they are here.

    Args:
        trainer: the trainer.
        values: name → values, the same names and shapes on every process.
    """
    if not is_distributed(trainer) or not values:
        return values
    table = torch.cat([value.reshape(-1).double().cpu() for value in values.values()])
    known = table.isfinite()
    sums = torch.stack([torch.where(known, table, 0.0), known.double()]).to(device_of(trainer))
    torch.distributed.all_reduce(sums)
    total, count = sums.cpu()
    filled = torch.where(count > 0, total / count, table)
    parts = filled.split([value.numel() for value in values.values()])
    return {
        name: part.to(value.dtype).reshape(value.shape)
        for (name, value), part in zip(values.items(), parts, strict=True)
    }
