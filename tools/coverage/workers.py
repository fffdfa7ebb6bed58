"""Run one function on many names, each in a process of its own whose time and memory are bounded.

The processes are forks of this one, so that what is imported here is imported once. A crash, a kill or an endless
loop in one of them is that one's result and nothing else's.
"""

import faulthandler
import json
import os
import resource
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """The outcome of one name.

    Attributes:
        name: what the function was called with.
        value: what it returned, through JSON; None where it did not return.
        problem: why not, as a clause; None where it returned.
        seconds: from start to end.
        peak: most memory that was resident at a time, in MiB.
    """

    name: str
    value: Any
    problem: str | None
    seconds: float
    peak: float


class _Child:
    def __init__(self, name: str, pid: int, pipe: int, deadline: float) -> None:
        self.name, self.pid, self.pipe, self.deadline = name, pid, pipe, deadline
        self.started = time.monotonic()
        self.data = bytearray()
        self.late = False


def run_each(
    function: Callable[[str], Any],
    names: Sequence[str],
    *,
    jobs: int = 1,
    timeout: float = 120.0,
    memory: int = 6144,
) -> Iterator[Outcome]:
    """Call a function on each name in a forked process.

    Yields:
        One outcome a name, as they end.
    """
    waiting = list(reversed(names))
    running: dict[int, _Child] = {}
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    child = _start(function, waiting.pop(), timeout, memory)
                    running[child.pipe] = child
                    selector.register(child.pipe, selectors.EVENT_READ)
                for key, _ in selector.select(timeout=0.2):
                    child = running[key.fd]
                    part = os.read(key.fd, 1 << 16)
                    child.data += part
                    if not part:
                        selector.unregister(key.fd)
                        del running[key.fd]
                        yield _end(child, timeout, memory)
                for child in running.values():
                    if not child.late and time.monotonic() > child.deadline:
                        child.late = True
                        os.kill(child.pid, signal.SIGKILL)
        finally:
            for child in running.values():
                os.kill(child.pid, signal.SIGKILL)
                os.close(child.pipe)
                os.waitpid(child.pid, 0)


def _start(function: Callable[[str], Any], name: str, timeout: float, memory: int) -> _Child:
    reading, writing = os.pipe()
    mapped_only = _mapped_only()  # a fork has fewer pages in memory, and would take it for more room
    pid = os.fork()
    if pid:
        os.close(writing)
        return _Child(name, pid, reading, time.monotonic() + timeout)
    # In the child: nothing of the parent's runs again, its exit handlers included.
    status = 1
    try:
        os.close(reading)
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        faulthandler.disable()
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        _bound_memory(memory, mapped_only)
        try:
            message = {"value": function(name)}
        except MemoryError:
            message = {"problem": f"it needs more than {memory} MiB"}
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(last.filename)}:{last.lineno}"
            message = {"problem": f"{type(error).__name__}: {_short(str(error))} ({where})"}
        data = json.dumps(message).encode()
        while data:
            data = data[os.write(writing, data) :]
        status = 0
    finally:
        os._exit(status)


def _mapped_only() -> int | None:
    """Bytes of this process's address space that are not in memory; None where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            mapped, resident = (int(part) for part in file.read().split()[:2])
    except OSError:  # not Linux
        return None
    return (mapped - resident) * os.sysconf("SC_PAGE_SIZE")


def _bound_memory(memory: int, mapped_only: int | None) -> None:
    """Let resident memory grow to the bound and no further: what is mapped and not resident stays allowed."""
    if mapped_only is not None:
        limit = mapped_only + (memory << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end(child: _Child, timeout: float, memory: int) -> Outcome:
    os.close(child.pipe)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - child.started
    peak = usage.ru_maxrss / 1024
    problem: str | None
    if child.late:
        return Outcome(child.name, None, f"it was not done after {timeout:g} s", seconds, peak)
    try:
        message = json.loads(bytes(child.data).decode())
    except ValueError:
        code = os.waitstatus_to_exitcode(status)
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return Outcome(child.name, None, f"its process ended {how}", seconds, peak)
    problem = message.get("problem")
    if problem is not None and ("DefaultCPUAllocator" in problem or "allocate memory" in problem):
        problem = f"it needs more than {memory} MiB"
    return Outcome(child.name, message.get("value"), problem, seconds, peak)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."
