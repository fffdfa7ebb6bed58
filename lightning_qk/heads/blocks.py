"""Find the transformer blocks around attention layers, whose outputs are the hidden states."""

import re
import sys
from typing import NamedTuple

from torch import nn

from lightning_qk.heads.find import Site, attention_sites

_LISTS = (nn.ModuleList, nn.Sequential)


class Block(NamedTuple):
    """One block where it stands.

    Attributes:
        module: the block.
        models: Hugging Face models that contain it, nearest first: they are given the mask of the tokens.
        is_first: it is the first of its stack, so that its input is what comes out of the embedding.
    """

    module: nn.Module
    models: tuple[nn.Module, ...]
    is_first: bool


def find_blocks(model: nn.Module) -> tuple[dict[str, Block], dict[str, str]]:
    """Find the blocks that the attention layers of a model are in.

    A block is an element of a list of modules (``nn.ModuleList``, ``nn.Sequential``) within one Hugging Face
    model: the outermost one that has no second layer of self-attention, so that lists of sublayers (T5), stages of
    blocks (Swin) and lists of models are not taken for blocks; else the innermost one.

    Args:
        model: any module.

    Returns:
        Qualified name → block, in module order, shared ones once; and qualified names of the attention layers
        that are in no list → why they have none.
    """
    sites = list(attention_sites(model))
    own = [site.name for site in sites if not site.is_cross]
    blocks: dict[str, Block] = {}
    placed: dict[int, str] = {}
    without: dict[str, str] = {}
    stacks: set[str] = set()
    for site in sites:
        found = _block_of(site, own)
        if found is None:
            without[site.name] = (
                "it stands in no list of blocks (nn.ModuleList or nn.Sequential), so that no block's output is "
                "known"
            )
            continue
        name, module = found
        if id(module) in placed:
            continue
        placed[id(module)] = name
        stack = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        models = tuple(owner for owner in site.ancestors if _is_model(owner))
        blocks[name] = Block(module, models, is_first=stack not in stacks)
        stacks.add(stack)
    return blocks, without


def _block_of(site: Site, own: list[str]) -> tuple[str, nn.Module] | None:
    """The block of one attention layer, by the names of all layers of self-attention."""
    parts = site.name.split(".")
    # Of the ancestors, nearest first: those that are elements of a list.
    candidates: list[tuple[str, nn.Module]] = []
    for depth, module in enumerate(site.ancestors[:-1]):
        if _is_model(module):
            break
        if isinstance(site.ancestors[depth + 1], _LISTS) and not isinstance(module, _LISTS):
            candidates.append((".".join(parts[: len(parts) - 1 - depth]), module))
    for name, module in reversed(candidates):
        if sum(other.startswith(f"{name}.") for other in own) <= 1:
            return name, module
    return candidates[0] if candidates else None


def _is_model(module: nn.Module) -> bool:
    # Not imported for this: without it there is no model of theirs. FSDP changes the class, not the ancestry.
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)
