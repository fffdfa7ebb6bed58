"""Eigenproblems beside the training: solved in a worker thread, handed back with the step they belong to."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional.spectrum import core_eigenvalues, core_singular_values


class Cores(NamedTuple):
    """The small matrices of layers of one shape, all that their spectra depend on.

    Attributes:
        names: the layers.
        matrices: shape ``(layers, heads, d_head, d_head)``.
        bilinear: they have eigenvalues; of the others (cross-attention) singular values are taken.
    """

    names: tuple[str, ...]
    matrices: Tensor
    bilinear: bool


def solve(cores: Sequence[Cores]) -> dict[str, Tensor]:
    """Spectrum of each layer.

    Returns:
        Layer name → complex eigenvalues ``(heads, d_head)`` in descending order of modulus, or real singular
        values in descending order.
    """
    return solve_each(cores)[0]


def solve_each(cores: Sequence[Cores]) -> tuple[dict[str, Tensor], list[str]]:
    """As :func:`solve`, and which heads have no spectrum: one eigenproblem that fails takes no other with it.

    Returns:
        Layer name → spectrum, NaN for a head whose eigenproblem failed; and what failed, as "name (head 3)".
    """
    spectra: dict[str, Tensor] = {}
    failed: list[str] = []
    for part in cores:
        matrices = part.matrices.cpu()
        try:
            values = _spectra(matrices, part.bilinear)
        except Exception:
            values = torch.stack(
                [
                    _spectra_by_head(layer, part.bilinear, name, failed)
                    for name, layer in zip(part.names, matrices, strict=True)
                ]
            )
        spectra.update(zip(part.names, values, strict=True))
    return spectra, failed


def _spectra(matrices: Tensor, bilinear: bool) -> Tensor:
    return core_eigenvalues(matrices) if bilinear else core_singular_values(matrices)


def _spectra_by_head(matrices: Tensor, bilinear: bool, name: str, failed: list[str]) -> Tensor:
    heads = []
    for head, matrix in enumerate(matrices):
        try:
            heads.append(_spectra(matrix, bilinear))
        except Exception:  # noqa: PERF203 (a few heads of one layer that failed)
            failed.append(f"{name} (head {head})")
            kind = matrix.dtype.to_complex() if bilinear else matrix.dtype
            heads.append(torch.full(matrix.shape[:1], torch.nan, dtype=kind))
    kind = next((values.dtype for values in heads if values.isfinite().all()), heads[0].dtype)
    return torch.stack([values.to(kind) for values in heads])


class Solved(NamedTuple):
    """Spectra of the weights at a step.

    Attributes:
        step: the step.
        spectra: layer name → spectrum, NaN for a head whose eigenproblem failed.
        failed: which heads those are.
    """

    step: int
    spectra: Mapping[str, Tensor]
    failed: Sequence[str] = ()


class EigenvalueWorker:
    """Solves eigenproblems in one thread, so that training does not wait for them.

    :meth:`collect` returns what was submitted, in order, and waits where it is not solved yet. To call it
    before the next :meth:`submit` bounds what is alive: the snapshot being solved and the new one. When a
    result is collected depends on the calls alone and not on how fast the thread is, so that all ranks of a
    distributed job collect the same.

    The thread runs LAPACK, which gives up Python's lock; it draws no random numbers.

    Args:
        one_core: keep the thread on one core. Matrices as small as a head's gain nothing from several, but keep
            them waiting for each other: on two cores the same time, and twice the processor time. For programs of
            our own only: torch has no other way to it than its number for the whole process, which threads that
            compute for the first time in that moment would keep.
    """

    def __init__(self, *, one_core: bool = False) -> None:
        self._one_core = one_core
        self._thread: ThreadPoolExecutor | None = None
        self._pending: tuple[int, Future[tuple[dict[str, Tensor], list[str]]]] | None = None

    @property
    def pending(self) -> int | None:
        """The step whose spectra are not collected yet, or None."""
        return None if self._pending is None else self._pending[0]

    def submit(self, step: int, cores: Sequence[Cores]) -> None:
        """Copy the matrices to the host, without waiting for the device, and start to solve them.

        Args:
            step: what they are handed back with.
            cores: on the CPU they are taken as they are: nothing may write into them.

        Raises:
            RuntimeError: the spectra before them were not collected.
        """
        if self._pending is not None:
            raise RuntimeError(f"expected collect() before the next submit(): step {self.pending} is pending")
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="lightning-qk-eigenvalues")
            if self._one_core:
                _keep_on_one_core(self._thread)
        copies = [_to_host(part) for part in cores]
        self._pending = (step, self._thread.submit(_solve_copies, copies))

    def collect(self) -> Solved | None:
        """The spectra that were submitted last, or None where there are none. Waits for them.

        Raises:
            Exception: whatever the eigenproblem raised. The step is no longer pending then.
        """
        try:
            return self.peek()
        finally:
            self._pending = None

    def peek(self) -> Solved | None:
        """What :meth:`collect` would return, which stays pending."""
        if self._pending is None:
            return None
        step, future = self._pending
        return Solved(step, *future.result())

    def close(self) -> None:
        """End the thread. What is pending is lost."""
        self._pending = None
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None


def _keep_on_one_core(thread: ThreadPoolExecutor) -> None:
    threads = torch.get_num_threads()

    def stay_on_one() -> None:
        torch.get_num_threads()  # a thread's first call would set the default again
        torch.set_num_threads(1)

    thread.submit(stay_on_one).result()
    # It is torch's number for the thread that asks, and for those that come later: they get the old one.
    torch.set_num_threads(threads)


def _to_host(cores: Cores) -> tuple[Cores, "torch.cuda.Event | None"]:
    matrices = cores.matrices.detach()
    if matrices.device.type != "cuda":
        return cores._replace(matrices=matrices.cpu()), None
    host = torch.empty(matrices.shape, dtype=matrices.dtype, pin_memory=True)
    host.copy_(matrices, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return cores._replace(matrices=host), copied


def _solve_copies(
    copies: "Sequence[tuple[Cores, torch.cuda.Event | None]]",
) -> tuple[dict[str, Tensor], list[str]]:
    for _, copied in copies:
        if copied is not None:
            copied.synchronize()
    return solve_each([cores for cores, _ in copies])
