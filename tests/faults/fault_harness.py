"""Training runs in which something goes wrong, each in a process of its own; all of a run follows from its plan.

A :class:`Plan` says what fails, when and where, and who watches. :class:`Nursery` is one process that has
imported everything and forks a child for each run, so that a run costs no import, may be killed, and may hang. A
child trains and leaves what :func:`run` returns in its folder.
``python fault_harness.py PLAN.json FOLDER`` makes one
run by hand.
"""

import ctypes
import dataclasses
import errno
import json
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
OUTCOME, PLAN, OUTPUT, RECORD = "outcome.pt", "plan.json", "output.txt", "lightning_qk_record.safetensors"
HUNG = "hung"


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        fault: a name in :data:`FAULTS`.
        step: optimizer step before which it happens.
        layer: of two, the one that it happens to.
        callbacks: names in :data:`CALLBACKS`; none is the job alone.
        model: a name in ``models``.
        steps: how long the job trains.
        every: ``log_every_n_steps``.
        accumulate: micro-batches a step.
        validate: batches between validations, in the middle of an accumulation where these do not fit; 0: never.
        processes: how many ranks.
        save_every: steps between checkpoints; 0: none.
        resume: go on from the newest checkpoint in the folder.
        seed: of everything that is drawn.
    """

    fault: str = "none"
    step: int = 3
    layer: int = 0
    callbacks: tuple[str, ...] = ()
    model: str = "gpt2"
    steps: int = 8
    every: int = 2
    accumulate: int = 1
    validate: int = 0
    processes: int = 1
    save_every: int = 0
    resume: bool = False
    seed: int = 0

    def alone(self) -> "Plan":
        """The same job without our callbacks."""
        return dataclasses.replace(self, callbacks=())

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PLAN).write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        return cls(
            **{**(given := json.loads((folder / PLAN).read_text())), "callbacks": tuple(given["callbacks"])}
        )


MONITORS = ("spectrum", "singular", "attention", "hidden", "sinks", "position", "tokens", "guard")
RANK_FAULTS = ("one_rank_linalg", "one_rank_memory", "one_rank_skips", "one_rank_logger", "uneven_validation")


def drawn(seed: int) -> Plan:
    """The plan of a seed: every fault has its turn, the rest is drawn."""
    names = [name for name in FAULTS if name != "none" and not name.startswith("steered")]
    fault = names[seed % len(names)]
    rng = random.Random(seed)
    ranks = fault in RANK_FAULTS
    # Of one class a trainer takes one.
    left_out = rng.choice(("spectrum", "singular"))
    watching = [name for name in MONITORS if name != left_out]
    return Plan(
        fault=fault,
        step=rng.randint(1, 5),
        layer=rng.randint(0, 1),
        callbacks=tuple(sorted(rng.sample(watching, rng.randint(2, len(watching))))),
        model=rng.choice(("gpt2", "llama", "bert")),
        steps=rng.randint(7, 9),
        every=rng.choice((1, 2, 3)),
        accumulate=1 if ranks else rng.choice((1, 1, 3)),
        validate=rng.choice((0, 0, 2, 4)) if fault != "uneven_validation" else 2,
        processes=2 if ranks else 1,
        seed=seed,
    )


# What goes wrong: each a function of the injury, called when its step has come (at) or before the fit (before).


@dataclasses.dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        at: what is done once, before the step's first batch.
        before: what is done before the trainer is made.
        no_disk: nothing can be written in the run's folder.
        ends: the job itself does not come to its end.
        resumes: the run is killed, and goes on from its newest checkpoint.
    """

    at: Callable[["Any"], None] | None = None
    before: Callable[["Any"], None] | None = None
    no_disk: bool = False
    ends: bool = False
    resumes: bool = False


FAULTS: dict[str, Fault] = {"none": Fault()}


def fault(**arguments: Any) -> Callable[[Callable], Callable]:
    """Register a function as what happens at the step, under its own name."""

    def register(function: Callable) -> Callable:
        FAULTS[function.__name__] = Fault(at=function, **arguments)
        return function

    return register


def preparation(**arguments: Any) -> Callable[[Callable], Callable]:
    """Register a function as what is done before the fit, under its own name."""

    def register(function: Callable) -> Callable:
        FAULTS[function.__name__] = Fault(before=function, **arguments)
        return function

    return register


@fault()
def nan_weight(injury: Any) -> None:
    injury.poison_weight(float("nan"))


@fault()
def inf_weight(injury: Any) -> None:
    injury.poison_weight(float("inf"))


@fault()
def nan_activation(injury: Any) -> None:
    injury.poison_activation(float("nan"))


@fault()
def inf_activation(injury: Any) -> None:
    injury.poison_activation(float("inf"))


@fault()
def nan_gradient(injury: Any) -> None:
    injury.gradient = float("nan")


@fault()
def inf_gradient(injury: Any) -> None:
    injury.gradient = float("inf")


@fault()
def nan_loss(injury: Any) -> None:
    injury.job.extra_loss = lambda job: float("nan")


@fault()
def dropped_layer(injury: Any) -> None:
    """From now on the layer passes its input on."""
    block = injury.blocks()[injury.plan.layer]
    block.forward = lambda states, *args, **kwargs: states


@fault()
def dropped_layer_for_a_step(injury: Any) -> None:
    block = injury.blocks()[injury.plan.layer]
    block.forward = lambda states, *args, **kwargs: states
    injury.later.append(lambda: block.__dict__.pop("forward", None))


@fault()
def copied_layer(injury: Any) -> None:
    """A deep copy, hooks and all, takes the layer's place."""
    import copy

    blocks = injury.blocks()
    blocks[injury.plan.layer] = copy.deepcopy(blocks[injury.plan.layer])


@fault()
def fresh_attention(injury: Any) -> None:
    """Attention of another object and other weights takes the place of the layer's."""
    import torch

    block = injury.blocks()[injury.plan.layer]
    name, old = injury.attention(block)
    torch.manual_seed(3)
    fresh = type(old)(old.config, layer_idx=getattr(old, "layer_idx", 0)) if hasattr(old, "config") else None
    if fresh is not None:
        owner = block
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, fresh)


@fault()
def deleted_layer(injury: Any) -> None:
    del injury.blocks()[injury.plan.layer]


@fault()
def pruned_weights(injury: Any) -> None:
    """Weights become products of weights and masks, as ModelPruning does."""
    from torch.nn.utils import prune

    _, attention = injury.attention(injury.blocks()[injury.plan.layer])
    for module in list(attention.modules()):
        if "weight" in dict(module.named_parameters(recurse=False)) and module.weight.dim() == 2:
            prune.l1_unstructured(module, "weight", amount=0.3)


@fault()
def frozen_layer(injury: Any) -> None:
    injury.blocks()[injury.plan.layer].requires_grad_(False)


@fault()
def learning_rate_by_hand(injury: Any) -> None:
    injury.trainer.optimizers[0].param_groups[0]["lr"] = 3e-4


@fault(ends=True)
def error_in_training_step(injury: Any) -> None:
    def fail(job: Any) -> Any:
        raise RuntimeError("the user's own error")

    injury.job.extra_loss = fail


@fault(ends=True)
def error_in_callback(injury: Any) -> None:
    raise ValueError("the user's own callback")


@fault(ends=True)
def interrupted(injury: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@fault(ends=True)
def terminated(injury: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@fault(ends=True, resumes=True)
def killed(injury: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@fault()
def stopped(injury: Any) -> None:
    injury.trainer.should_stop = True


@fault()
def folder_removed(injury: Any) -> None:
    import shutil

    shutil.rmtree(injury.run_folder, ignore_errors=True)


@fault()
def disk_full_later(injury: Any) -> None:
    """From now on no file grows beyond a page: what a full disk is to whoever writes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    injury.at_end.append(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)))


@fault()
def linalg_error_once(injury: Any) -> None:
    injury.fail_once("eigvals", _linalg_error)


@fault()
def out_of_memory_once(injury: Any) -> None:
    injury.fail_in_package(MemoryError, injury.plan.seed % 7)


@preparation(no_disk=True)
def full_disk(injury: Any) -> None:
    """A file system of one page, or, where none may be mounted, files that cannot be opened for writing."""
    if not _mount(injury.run_folder, "size=4k", read_only=False):
        _refuse_to_open(injury.run_folder, errno.ENOSPC)


@preparation(no_disk=True)
def read_only_folder(injury: Any) -> None:
    if not _mount(injury.run_folder, "size=4k", read_only=True):
        _refuse_to_open(injury.run_folder, errno.EROFS)


@preparation(no_disk=True)
def folder_is_a_file(injury: Any) -> None:
    injury.run_folder.rmdir()
    injury.run_folder.write_text("not a folder")


@preparation()
def log_metrics_raises(injury: Any) -> None:
    injury.logger_fails = "log_metrics"


@preparation()
def log_hyperparams_raises(injury: Any) -> None:
    injury.logger_fails = "log_hyperparams"


@preparation()
def add_image_raises(injury: Any) -> None:
    injury.logger_fails = "add_image"


@preparation()
def add_histogram_raises(injury: Any) -> None:
    injury.logger_fails = "add_histogram"


@fault()
def one_rank_linalg(injury: Any) -> None:
    if injury.rank == 1:
        injury.fail_once("eigvals", _linalg_error)


@fault()
def one_rank_memory(injury: Any) -> None:
    """Memory runs out on one rank alone, somewhere in measuring."""
    if injury.rank == 1:
        injury.fail_in_package(MemoryError, injury.plan.seed % 7)


@fault()
def one_rank_skips(injury: Any) -> None:
    if injury.rank == 1:
        dropped_layer_for_a_step(injury)


@preparation()
def one_rank_logger(injury: Any) -> None:
    if injury.rank == 0:
        injury.logger_fails = "log_metrics"


@preparation()
def uneven_validation(injury: Any) -> None:
    injury.validation_batches = 2 + 3 * injury.rank


@fault()
def steered_sharpen(injury: Any) -> None:
    """Query weights that grow by half at every step from now on: a collapse."""
    injury.sharpens = True


def _linalg_error() -> Exception:
    import torch

    return torch.linalg.LinAlgError("the algorithm failed to converge")


def _mount(folder: Path, options: str, *, read_only: bool) -> bool:
    """A small file system over the folder, for this process alone; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, new_user, private, recursive, only_read = 0x00020000, 0x10000000, 1 << 18, 1 << 14, 1
    if libc.unshare(new_namespace) and libc.unshare(new_user | new_namespace):
        return False
    libc.mount(None, b"/", None, private | recursive, None)
    arguments = (b"tmpfs", str(folder).encode(), b"tmpfs", only_read if read_only else 0, options.encode())
    return libc.mount(*arguments) == 0


def _refuse_to_open(folder: Path, code: int) -> None:
    """Files in the folder cannot be written: for machines where nothing may be mounted."""
    import builtins
    import io

    true_open = io.open

    def refusing(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if (
            isinstance(file, str | os.PathLike)
            and set(mode) & set("wax+")
            and str(file).startswith(str(folder))
        ):
            raise OSError(code, os.strerror(code), str(file))
        return true_open(file, mode, *args, **kwargs)

    def no_folder(path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).startswith(str(folder)) and not os.path.isdir(path):
            raise OSError(code, os.strerror(code), str(path))

    builtins.open = io.open = refusing  # type: ignore[assignment]
    os.mkdir = no_folder  # type: ignore[assignment]

    import safetensors.torch

    def no_save(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code), str(path))

    safetensors.torch.save_file = no_save


# Who watches and who steers. Imports are inside: the tests read this file without paying for them.


def make_callback(name: str) -> Any:
    import lightning_qk as qk

    few = {"figures_every": 2}
    table: dict[str, Callable[[], Any]] = {
        "spectrum": lambda: qk.QKSpectrumMonitor(**few),
        "singular": lambda: qk.QKSpectrumMonitor(singular=True, **few),
        "attention": lambda: qk.AttentionMonitor(**few),
        "hidden": lambda: qk.HiddenStateMonitor(),
        "sinks": lambda: qk.SinkMonitor(**few),
        "position": lambda: qk.PositionMonitor(sequences=None, **few),
        "tokens": lambda: qk.TokenMonitor(predict_every=2, **few),
        "guard": lambda: qk.CollapseGuard(every_n_steps=1, checkpoint_every=2),
        "locater": lambda: qk.LocAteR(0.5, form="target"),
        "locater_warmup": lambda: qk.LocAteR(0.5, schedule="linear", warmup_steps=6),
        "qk_clip": lambda: qk.QKClip(1.5),
        "update_cap": lambda: qk.UpdateCap(0.002, iterations=1),
        "sigma_reparam": lambda: qk.SigmaReparam(),
        "soft_cap": lambda: qk.SoftCap(2.0),
        "spectrum_scaling": lambda: qk.SpectrumScaling(0.5),
        "attention_mask": lambda: qk.DifferentiableAttentionMask(max_length=16, weight=0.01),
        "attention_prior": lambda: qk.AttentionPrior(weight=0.5, prior="diagonal"),
        "entropy_band": lambda: qk.EntropyBand(weight=0.5, low=0.6, high=0.7),
        "hard_attention": lambda: qk.HardAttention(),
        "guard_clips": lambda: qk.CollapseGuard(
            qk.QKClip(5.0), every_n_steps=1, rollback=True, lr_factor=0.5, lr_warmup=2, checkpoint_every=2
        ),
    }
    return table[name]()


INTERVENTIONS = (
    "locater",
    "locater_warmup",
    "qk_clip",
    "update_cap",
    "sigma_reparam",
    "soft_cap",
    "spectrum_scaling",
    "attention_mask",
    "attention_prior",
    "entropy_band",
    "hard_attention",
    "guard_clips",
)


def run(plan: Plan, folder: Path, rank: int = 0) -> dict[str, Any]:
    """Train, and say how it ended.

    Returns:
        ``end``: how; ``losses``; ``weights``, name → tensor; ``histories``, callback → steps and values;
        ``scalars``, of callbacks with an account; ``notes``; ``hooks`` that are left behind; ``steps``.
    """
    from fault_job import Injury, make_job, make_trainer

    folder = Path(folder)
    injury = Injury(plan, folder, rank)
    if FAULTS[plan.fault].before is not None and not plan.resume:
        FAULTS[plan.fault].before(injury)
    callbacks = [make_callback(name) for name in plan.callbacks]
    job, trainer = make_job(plan), make_trainer(plan, injury, callbacks)
    injury.job, injury.trainer = job, trainer
    checkpoint = newest_checkpoint(folder) if plan.resume else None
    warned: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            injury.fit(checkpoint)
            end = "finished"
        except BaseException as error:
            end = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        warned += [str(warning.message) for warning in caught]
    return injury.outcome(end, plan, callbacks) | {"warnings": warned}


def newest_checkpoint(folder: Path) -> Path:
    found = sorted(
        (folder / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2])
    )
    assert found, "no checkpoint was written before the run was killed"
    return found[-1]


# Processes.


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Nursery:
    """A process that has imported everything and forks a child for each run."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(TESTS), str(TESTS.parent)]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def run(self, plan: Plan, folder: Path, timeout: float = 40.0) -> list[dict[str, Any]]:
        """Train in children, one for each rank.

        Returns:
            What :func:`run` returns, of each rank; ``end`` is "hung" of a process that had to be killed, and
            "signal N" of one that was killed by the fault.
        """
        import torch

        plan.save(folder)
        for rank in range(plan.processes):
            (folder / f"{rank}_{OUTCOME}").unlink(missing_ok=True)
        order = {"folder": str(folder), "processes": plan.processes, "timeout": timeout, "port": free_port()}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], timeout + 90)
        assert ready, "the nursery does not answer"
        ends = json.loads(self.process.stdout.readline())
        outcomes = []
        for rank, end in enumerate(ends):
            path = folder / f"{rank}_{OUTCOME}"
            outcome = torch.load(path, weights_only=False) if path.exists() and end != HUNG else {}
            outcome.setdefault("end", end if end == HUNG or end.startswith("signal") else f"died: {end}")
            outcome["output"] = (folder / f"{rank}_{OUTPUT}").read_text(errors="replace")
            outcomes.append(outcome)
        return outcomes

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _child(folder: Path, rank: int, processes: int, port: int) -> None:
    """In the child: an environment of its own, one run, its outcome."""
    import torch

    output = os.open(folder / f"{rank}_{OUTPUT}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.setsid()
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if processes > 1:
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "faults",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    outcome = run(Plan.load(folder), folder, rank)
    torch.save(outcome, folder / f"{rank}_{OUTCOME}")


def _serve() -> None:
    """Orders from stdin, one a line; how the children ended to stdout."""
    import fault_job

    fault_job.warm_up()
    for line in sys.stdin:
        order = json.loads(line)
        pids = []
        for rank in range(order["processes"]):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    _child(Path(order["folder"]), rank, order["processes"], order["port"])
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            pids.append(pid)
        print(json.dumps(_wait(pids, time.monotonic() + order["timeout"])), flush=True)


def _wait(pids: Sequence[int], deadline: float) -> list[str]:
    ends: dict[int, str] = {}
    while len(ends) < len(pids):
        for pid in pids:
            if pid not in ends and (status := os.waitpid(pid, os.WNOHANG))[0]:
                code = os.waitstatus_to_exitcode(status[1])
                ends[pid] = f"signal {-code}" if code < 0 else f"exit {code}"
        if time.monotonic() > deadline:
            for pid in pids:
                if pid not in ends:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    ends[pid] = HUNG
        time.sleep(0.01)
    return [ends[pid] for pid in pids]


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        _serve()
    else:
        where = Path(sys.argv[2])
        where.mkdir(parents=True, exist_ok=True)
        (where / PLAN).write_text(Path(sys.argv[1]).read_text())
        print(run(Plan.load(where), where)["end"])
