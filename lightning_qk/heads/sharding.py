"""Live weights, those that are spread over processes too: made whole for one layer.

DTensors (FSDP2, tensor parallel) are gathered by their own collective, which is differentiable: the gradient of
what was gathered ends on the local shard. The flat parameters of FSDP's first version are gathered for the
time of a block. Gathering is collective: every process must read the same layers in the same order.
"""

import itertools
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.heads.projections import InaccessibleWeights


def alive(reference: "weakref.ref[nn.Module]") -> nn.Module:
    """The module behind a weak reference.

    Raises:
        RuntimeError: it is gone.
    """
    module = reference()
    if module is None:
        raise RuntimeError(
            "expected the modules of the model that was read first, got one that is gone: keep a reference to the "
            "model, and call refresh() on the reader after replacing modules"
        )
    return module


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is a DTensor; the class is looked up only where it was imported already."""
    home = sys.modules.get("torch.distributed.tensor")
    return home is not None and isinstance(tensor, home.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor: a DTensor is gathered (collective, differentiable), others come back unchanged."""
    if not is_dtensor(tensor):
        return tensor
    sharded: Any = tensor
    # Shards that FSDP2 keeps on the host are gathered where their processes can talk to each other.
    if sharded.device.type != sharded.device_mesh.device_type:
        sharded = sharded.to(sharded.device_mesh.device_type)
    return sharded.full_tensor()


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: that of its first parameter or buffer, or the CPU."""
    tensor: Any = next(itertools.chain(module.parameters(), module.buffers()), None)
    if tensor is None:
        return torch.device("cpu")
    return torch.device(tensor.device_mesh.device_type) if is_dtensor(tensor) else tensor.device


def check_access(tensor: Tensor, what: str) -> None:
    """Raises for a weight whose values this process cannot read.

    Args:
        tensor: the weight.
        what: what it is, for the message: "its projection 'q_proj'".

    Raises:
        InaccessibleWeights: it is partitioned by DeepSpeed, or on the meta device.
    """
    if hasattr(tensor, "ds_id") or hasattr(tensor, "ds_status"):
        raise InaccessibleWeights(
            f"the weight of {what} is partitioned by DeepSpeed ZeRO stage 3, which keeps it out of reach: use "
            "stage 1 or 2, or FSDP2 (ModelParallelStrategy, see configs/fsdp2.yaml)"
        )
    if tensor.is_meta:
        raise InaccessibleWeights(
            f"the weight of {what} is on the meta device, where it has no values: load or initialize the weights "
            "before they are read (module.to_empty(device=...), then the initialization)"
        )


def flat_unit(chain: Iterable[nn.Module]) -> nn.Module | None:
    """The first of some modules that FSDP's first version wraps; its weights are flat outside the forward."""
    home = sys.modules.get("torch.distributed.fsdp")
    if home is None:
        return None
    return next((module for module in chain if isinstance(module, home.FullyShardedDataParallel)), None)


def flat_root(chain: Sequence[nn.Module]) -> nn.Module | None:
    """The last such module of a chain that goes outwards."""
    return flat_unit(reversed(chain))


def gathered(
    unit: "weakref.ref[nn.Module] | None", root: "weakref.ref[nn.Module] | None", *, grads: bool = False
) -> AbstractContextManager[None]:
    """Within this block the flat parameters of an FSDP unit are whole; with ``grads`` their gradients too."""
    if unit is None:
        return nullcontext()
    own = unit()
    assert own is not None  # it contains the layer, whose modules are alive
    return _unflattened(own, None if root is None else root(), grads=grads)


@contextmanager
def _unflattened(unit: nn.Module, root: nn.Module | None, *, grads: bool = False) -> Iterator[None]:
    """Make the flat parameters of one FSDP unit whole until the block ends; collective.

    Args:
        unit: from :func:`flat_unit`.
        root: the outermost of all units of the model, or None where it is not known.
        grads: gradients too; what the block adds to them is kept.

    Raises:
        InaccessibleWeights: the units have not run yet and their root is not known, or gradients are asked of
            parameters that are flattened for good.
    """
    fsdp: Any = sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel
    any_unit: Any = unit
    if any_unit._is_root is None:
        if root is None:
            raise InaccessibleWeights(
                "its weights are in an FSDP unit that has not run yet, and the unit around the whole model is not "
                "at hand: pass that one, or read after the first forward"
            )
        # The first unit to be gathered becomes the root, which only the outermost may be.
        with fsdp.summon_full_params(root, recurse=False, writeback=False):
            pass
    if grads and not any_unit._use_orig_params:
        raise InaccessibleWeights(
            "its weights are flattened by FSDP, so that no gradient can be added to one of them: pass "
            "use_orig_params=True to FSDP, or use FSDP2 (ModelParallelStrategy, see configs/fsdp2.yaml)"
        )
    # Entered and left by its own statement: the context belongs to one unit and never nests.
    with fsdp.summon_full_params(unit, recurse=False, writeback=grads, with_grads=grads):
        yield
