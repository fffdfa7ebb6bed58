"""The Triton kernels: in the interpreter, by the compiler for a GPU that is not here, and on one that is."""

import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import dense_attention

from lightning_qk.functional import _kernel, attention_statistics
from lightning_qk.functional import attention as localization
from lightning_qk.functional.attention import attention_sums

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason='needs triton: pip install ".[kernels]"'
)


def run(*arguments: str, **environment: str) -> str:
    """What a fresh interpreter prints; its output is the message when it fails.

    It is ended by the processor's time that it takes: the clock's depends on what else runs.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=HERE.parent.parent,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (900, 900)),
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("which", ["not slow", "slow"])
def test_interpreted(which):
    cases = str(HERE / "kernel_cases.py")
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, cases, TRITON_INTERPRET="1")
    assert " passed" in out
    assert " skipped" not in out


@pytest.mark.slow
@needs_triton
def test_registers_of_the_compiled_code(tmp_path):
    """Types, layouts and shared memory, which the interpreter does not look at; no more is spilt than is kept."""
    cases = ("rows, causal, d 64", "rows, sampled", "keys, mask")
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    check = ("benchmarks/registers.py", "--check", "docs/performance.json")
    out = run(*check, *cases, **environment)
    assert all(case in out for case in cases)


def test_registers_are_kept_of_every_case():
    kept = json.loads((HERE.parents[1] / "docs" / "performance.json").read_text())["kernels"]["kernels"]
    assert len(kept) >= 18
    for name, by in kept.items():
        assert set(by) == {"sm_80", "sm_90", "sm_100"}, name
        for registers, spilt, shared in by.values():
            assert 0 < registers <= 255
            # A few numbers of a thread at most, but where a call has all that there is.
            assert spilt <= (200 if "sinks" in name else 60), name
            assert shared <= 160 * 1024, name


def test_nothing_is_launched_on_the_cpu(monkeypatch):
    monkeypatch.setattr(_kernel, "launch", lambda *_, **__: pytest.fail("launched"))
    attention_statistics(torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8), is_causal=True)


class FakeCuda(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


@pytest.fixture
def pretend(monkeypatch):
    """As if the tensors were on a GPU and triton were installed, up to the launch itself."""
    monkeypatch.setattr(_kernel, "_broken", set())
    monkeypatch.setattr(_kernel.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())

    def sums(**arguments):
        torch.manual_seed(3)
        query, key = torch.randn(2, 1, 2, 9, 8).unbind()
        # Only the dispatch looks at the query's device.
        with monkeypatch.context() as patch:
            original = localization.kernel_rows
            patch.setattr(
                localization,
                "kernel_rows",
                lambda source, *rest, **options: original(
                    source.replace(query=source.query.as_subclass(FakeCuda)), *rest, **options
                ),
            )
            return attention_sums(query, key, **arguments)

    return sums


def test_a_kernel_that_cannot_be_built_is_named_once(pretend, monkeypatch, recwarn):
    want = attention_sums(
        *torch.randn(2, 1, 2, 9, 8, generator=torch.manual_seed(3)).unbind(), is_causal=True
    )
    launched = []

    def launch(*_, **__):
        launched.append(1)
        raise RuntimeError("long story\nFailed to find C compiler.")

    monkeypatch.setattr(_kernel, "launch", launch)
    with pytest.warns(
        UserWarning, match=r"without their Triton kernel.*RuntimeError: Failed to find C compiler"
    ):
        got = pretend(is_causal=True)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    recwarn.clear()
    pretend(is_causal=True)
    assert not recwarn
    assert len(launched) == 1


def test_a_mask_function_and_float64_go_by_chunks(pretend, monkeypatch):
    monkeypatch.setattr(_kernel, "launch", lambda *_, **__: pytest.fail("launched"))
    pretend(mask=lambda batch, head, query, key: key <= query)
    query, key = torch.randn(2, 1, 2, 9, 8, dtype=torch.float64).unbind()
    source = localization.AttentionLogits.of(query, key)
    assert not _kernel.fits(source)
    assert _kernel.fits(source.replace(query=query.float(), key=key.bfloat16()))


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@needs_gpu
@needs_triton
class TestOnAGPU:
    @pytest.fixture(autouse=True)
    def only_kernels(self, monkeypatch):
        """Falling back to chunks would hide a kernel that does not work."""
        monkeypatch.setattr(_kernel, "_broken", set())
        monkeypatch.setattr(localization, "collect_rows", lambda *_: pytest.fail("went by chunks"))

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)]
    )
    @pytest.mark.parametrize("d", [16, 64, 96, 128, 256])
    @pytest.mark.parametrize("case", ["causal", "bidirectional", "window", "mask", "additive", "everything"])
    def test_against_dense_float64(self, dtype, tolerance, d, case):
        n = 333
        query, key = torch.randn(1, 4, n, d), torch.randn(1, 2, n, d)
        key[:, 0, 2] = 2 * query[:, 0].mean(1)
        query, key = query.to(dtype), key.to(dtype)
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        causal, near = (j <= i)[None, None], ((i - j).abs() < 100)[None, None]
        keep = (j >= 40)[None, None]
        arguments, oracle = {
            "causal": ({"is_causal": True}, {"visible": causal}),
            "bidirectional": ({}, {}),
            "window": ({"is_causal": True, "sliding_window": 100}, {"visible": causal & near}),
            "mask": ({"mask": causal & keep}, {"visible": causal & keep, "padding": (j >= 40)}),
            "additive": (
                {"mask": torch.zeros(1, 1, n, n, dtype=dtype).masked_fill(~causal, -torch.inf)},
                {"visible": causal},
            ),
            "everything": (
                {"bias": torch.randn(1, 4, n, n), "softcap": 3.0, "sinks": torch.randn(4), "scaling": 0.2},
                {},
            ),
        }[case]
        if case == "everything":
            oracle = dict(arguments)
        moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        got = attention_statistics(query.cuda(), key.cuda(), **moved)
        want = dense_attention(query, key, **oracle)
        assert set(got) == set(want)
        for name, value in got.items():
            torch.testing.assert_close(
                value.double().cpu(), want[name], rtol=tolerance, atol=tolerance,
                msg=lambda m, n=name: f"{n}: {m}",
            )  # fmt: skip

    @pytest.mark.parametrize("rows", [None, 64])
    def test_long_sequences(self, rows, monkeypatch):
        """n = 8192 against the chunks in float32, in memory that grows with n alone."""
        query = torch.randn(1, 8, 8192, 128, device="cuda", dtype=torch.bfloat16)
        key = torch.randn(1, 2, 8192, 128, device="cuda", dtype=torch.bfloat16)
        call = {"is_causal": True, "rows": rows}

        def measure():
            return attention_statistics(query, key, generator=torch.Generator().manual_seed(0), **call)

        measure()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        got = measure()
        # A quarter of the n × n logits of one head in float32.
        assert torch.cuda.max_memory_allocated() - before < 8192 * 8192
        again = measure()
        monkeypatch.undo()
        monkeypatch.setattr(localization, "kernel_rows", lambda *_, **__: None)
        want = measure()
        for name, value in got.items():
            torch.testing.assert_close(
                value, want[name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert torch.equal(value, again[name]), name

    def test_does_not_wait_for_the_device(self):
        query, key = torch.randn(2, 1, 4, 256, 64, device="cuda", dtype=torch.bfloat16).unbind()
        attention_statistics(query, key, is_causal=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            attention_statistics(query, key, is_causal=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
