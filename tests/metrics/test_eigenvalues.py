"""Eigenproblems in a worker thread: the same numbers, in order, without waiting, nothing lost in silence."""

import threading
from concurrent.futures import ThreadPoolExecutor

import models
import pytest
import torch

from lightning_qk.functional import qk_eigenvalues
from lightning_qk.functional.spectrum import qk_singular_values
from lightning_qk.heads.reader import head_projections
from lightning_qk.metrics import eigenvalues as module
from lightning_qk.metrics.eigenvalues import Cores, EigenvalueWorker
from lightning_qk.metrics.spectrum import EXTREME_STATISTICS, MOMENT_STATISTICS, QKSpectrum, extreme_values


@pytest.fixture
def worker():
    out = EigenvalueWorker()
    yield out
    out.close()


def cores_of(model) -> tuple[list[Cores], dict, QKSpectrum]:
    projections = head_projections(model)
    metric = QKSpectrum({name: head.heads for name, head in projections.items()}, eigenvalues=False)
    metric.update(projections)
    return metric.cores, projections, metric


@pytest.mark.parametrize("kind", [models.llama, models.t5])
def test_the_spectra_are_those_of_the_weights(worker, kind):
    cores, projections, metric = cores_of(kind())
    worker.submit(7, cores)
    assert worker.pending == 7
    solved = worker.collect()
    assert solved.step == 7
    assert set(solved.spectra) == set(projections)
    for name, head in projections.items():
        spectrum = qk_eigenvalues if head.self_attention else qk_singular_values
        torch.testing.assert_close(solved.spectra[name], spectrum(head.query, head.key).detach())
    assert worker.pending is worker.collect() is None
    # And the same extremes as where the metric solves them itself.
    whole = QKSpectrum(metric.heads)
    whole.update(projections)
    everything = whole.compute()
    for name, value in extreme_values(solved.spectra, metric.heads).items():
        torch.testing.assert_close(value, everything[name], equal_nan=True)
    assert tuple(metric.compute()) == MOMENT_STATISTICS
    assert tuple(everything) == (*MOMENT_STATISTICS, *EXTREME_STATISTICS)


def test_only_the_thread_stays_on_one_core(monkeypatch):
    seen, worker = [], EigenvalueWorker(one_core=True)

    def solve(cores):
        torch.linalg.eigvals(torch.eye(3))
        seen.append(torch.get_num_threads())
        return {}, []

    def of_a_new_thread() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    monkeypatch.setattr(module, "solve_each", solve)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        worker.submit(0, [])
        worker.collect()
        assert seen == [1]
        assert torch.get_num_threads() == of_a_new_thread() == 2
    finally:
        worker.close()
        torch.set_num_threads(before)


def test_submit_does_not_wait_and_collect_does(worker, monkeypatch):
    may_go_on, main = threading.Event(), threading.get_ident()
    threads = []

    def slow(cores):
        threads.append(threading.get_ident())
        assert may_go_on.wait(30)
        return {name: torch.zeros(1) for part in cores for name in part.names}

    monkeypatch.setattr(module, "solve", slow)
    worker.submit(3, [Cores(("layer",), torch.eye(2)[None, None], bilinear=True)])
    assert worker.pending == 3  # we are here, though nothing is solved
    with pytest.raises(RuntimeError, match="step 3 is pending"):
        worker.submit(4, [])
    threading.Timer(0.1, may_go_on.set).start()
    assert worker.collect().step == 3
    assert threads != [main]


def test_a_failure_comes_out_where_the_result_would_and_only_once(worker, monkeypatch):
    monkeypatch.setattr(module, "solve_each", lambda cores: 1 / 0)
    worker.submit(1, [])
    with pytest.raises(ZeroDivisionError):
        worker.collect()
    assert worker.collect() is None
    monkeypatch.undo()
    worker.submit(2, [])
    assert worker.collect() == (2, {}, [])


def test_a_closed_worker_has_no_thread_and_can_start_again(worker):
    def alive() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("lightning-qk")]

    worker.submit(1, [])
    assert alive()
    worker.close()
    assert not alive()
    assert worker.collect() is None
    worker.submit(2, [])
    assert worker.collect().step == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_that_change_on_the_device_after_submit_do_not_matter(worker):
    matrices = torch.randn(2, 3, 64, 64, device="cuda")
    want = matrices.cpu()
    worker.submit(1, [Cores(("a", "b"), matrices, bilinear=True)])
    matrices.zero_()
    got = worker.collect().spectra
    torch.testing.assert_close(got["a"].abs().amax(-1), torch.linalg.eigvals(want[0]).abs().amax(-1))
