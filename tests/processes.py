"""Scripts of the tests in processes of their own, started as by torchrun, without waiting for imports each time.

A fresh process takes seconds to import torch, Lightning and transformers. One that has done so, and nothing else,
stays for all tests of a session and forks the others.
"""

import atexit
import fcntl
import functools
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

TESTS = Path(__file__).parent


def run_script(script: Path, *arguments: object, processes: int = 1, timeout: float = 240.0) -> None:
    """Runs a script; with more processes than one, in each of them, with what torchrun sets for it.

    Fails with what they wrote, where one ends with an error (the others are ended then) or takes too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        order = {
            "script": str(script),
            "arguments": [str(one) for one in arguments],
            "processes": processes,
            "timeout": timeout,
            "folder": folder,
        }
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        said = "\n".join(path.read_text()[-3000:] for path in sorted(Path(folder).iterdir()))
    assert answer == "0\n", f"{script.name} ended with {answer.strip() or 'its server'}:\n{said}"


def run_once(name: str, base: Path, run: Callable[[Path], None]) -> Path:
    """A folder with what a run leaves, made by whichever worker comes first; the others wait for it.

    Args:
        name: of the folder.
        base: ``tmp_path_factory.getbasetemp()`` of the worker.
        run: is given the folder.
    """
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = shared / name, shared / f"{name}.done"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            run(folder)
            done.touch()
    return folder


@functools.cache
def _server() -> subprocess.Popen:
    # The package of this checkout, wherever another one is installed.
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    server = subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _serve() -> None:
    import lightning
    import models
    import peft  # noqa: F401
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel  # noqa: F401

    import lightning_qk

    for name in lightning_qk.__all__:
        getattr(lightning_qk, name)
    for make in (models.gpt2, models.llama):
        make()
    assert lightning.__version__
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(f"{_start(**json.loads(line))}\n")
        answers.flush()


def _start(script: str, arguments: list[str], processes: int, timeout: float, folder: str) -> int | str:
    """The first exit status that is not 0, once all have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alive = set()
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _child(script, arguments, rank, processes, port, Path(folder, str(rank)))
        alive.add(pid)
    result: int | str = 0
    end = time.monotonic() + timeout
    while alive:
        pid, status = os.waitpid(-1, os.WNOHANG)
        alive.discard(pid)
        if pid == 0 and time.monotonic() > end:
            result = result or f"no end after {timeout} s"
        elif pid:
            result = result or os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.02)
        if result:
            for other in alive:
                os.kill(other, signal.SIGKILL)
    return result


def _child(script: str, arguments: list[str], rank: int, processes: int, port: int, log: Path) -> NoReturn:
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = 1
    try:
        if processes > 1:
            _as_torchrun(rank, processes, port)
        sys.argv = [script, *arguments]
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _as_torchrun(rank: int, processes: int, port: int) -> None:
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    variables: dict[str, Any] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tests",
    }
    os.environ.update({name: str(value) for name, value in variables.items()})
    rank_zero_only.rank = rank  # read from the environment when Lightning is imported


if __name__ == "__main__":
    _serve()
