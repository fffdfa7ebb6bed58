"""Shard a network over the processes of Lightning's ModelParallelStrategy, and bring it together again."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def shard_network(network: "PreTrainedModel", mesh: "DeviceMesh") -> None:
    """Shard parameters, gradients and optimizer states with FSDP2, a group for each block of the network.

    Args:
        network: changed in place.
        mesh: of the strategy, with dimensions ``data_parallel`` and ``tensor_parallel``.

    Raises:
        ValueError: a tensor parallel size above 1, which needs a plan of the model's own.
    """
    from torch.distributed.fsdp import fully_shard

    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"expected tensor_parallel_size=1, got {mesh['tensor_parallel'].size()}: TransformerModule shards "
            "over data parallel processes only (FSDP2); override configure_model to add a tensor parallel plan"
        )
    for block in _blocks(network):
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(network, mesh=mesh["data_parallel"])


def whole_state(network: nn.Module) -> dict[str, Tensor] | None:
    """All weights of a sharded network on the host, on the first process (the others get none).

    A collective call where the network is sharded; None where it is not.
    """
    from torch.distributed.tensor import DTensor

    if not any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(
        network, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return state


def _blocks(network: "PreTrainedModel") -> list[nn.Module]:
    """The modules that transformers itself keeps in one piece, the inner ones before what contains them."""
    names = set(getattr(network, "_no_split_modules", None) or ())
    return [module for module in reversed(list(network.modules())) if type(module).__name__ in names]
