"""Find the attention layers of a model, their blocks, and local heads."""

import itertools
import re
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.architecture.dry_run import quietly
from lightning_qk.architecture.labels import layer_labels
from lightning_qk.architecture.source_code import calls_sdpa, is_known, names_softmax, uses_interface
from lightning_qk.heads.layouts import find_layout
from lightning_qk.heads.live_weights import is_dtensor
from lightning_qk.heads.projections import UnreadLayer
from lightning_qk.heads.running import Bench, random, varied_parameters
from lightning_qk.heads.trials import input_arguments

_ATTENTION = re.compile(r"att(ention|n)|mhs?a|multi_?head", re.IGNORECASE)
# What surrounds attention carries its name too: outputs, biases, projections.
_NAMED_ATTENTION = re.compile(r"(attention|attn)(block|layer|subsample|poolinghead|module)?$", re.IGNORECASE)
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
_CROSS = re.compile(r"cross|enc_?dec|encoder_(attn|attention|decoder)", re.IGNORECASE)


class AttentionLayer(NamedTuple):
    """One attention layer in its model.

    Attributes:
        name: qualified name in the model.
        module: the layer.
        ancestors: the modules that contain it, nearest first.
        config: the nearest configuration, or None.
        is_cross: its names or flags say that keys come from other tokens than queries.
    """

    name: str
    module: nn.Module
    ancestors: tuple[nn.Module, ...] = ()
    config: Any = None
    is_cross: bool = False

    @property
    def is_known(self) -> bool:
        """Whether its forward is a known library's, whose names tell what its children do."""
        return is_known(self.module)

    @property
    def has_one_input(self) -> bool:
        """Whether its forward takes tokens by one argument alone: queries and keys are then made of the same."""
        return len(input_arguments(self.module)) <= 1

    @property
    def is_over_tokens(self) -> bool:
        """Whether it calls an attention function by a way that is known to take its softmax over tokens."""
        return uses_interface(self.module) or isinstance(self.module, nn.MultiheadAttention)


def attention_sites(model: nn.Module) -> Iterator[AttentionLayer]:
    """Yield every attention layer in module order, shared ones once.

    A layer is a module that fits a layout and has an attention-like class name or calls transformers' attention
    functions, or one that calls torch's scaled_dot_product_attention itself and is no part of such a layer. Any
    other counts if it contains no attention, and its class is named attention and has weights of its own, in lists
    too, or names a softmax and, run alone, takes it of a product that its projections make both sides of.
    """
    modules = dict(model.named_modules())
    fitting = {name for name, module in modules.items() if _fits(module)}
    calling = {
        name for name, module in modules.items() if calls_sdpa(module) and fitting.isdisjoint(_parents(name))
    }
    named = {name for name, module in modules.items() if _is_named_attention(module)}
    holders = {parent for name in fitting | calling | named for parent in _parents(name)}
    found = fitting | calling | {name for name in named if name not in holders}
    # The innermost first: a module that contains a layer is not one itself.
    for name, module in reversed(modules.items()):
        is_free = name not in holders and found.isdisjoint((name, *_parents(name)))
        if is_free and _takes_softmax(module) and reaches_product(module):
            found.add(name)
            holders.update(_parents(name))
    for name, module in modules.items():
        if name in found:
            ancestors = tuple(modules[parent] for parent in _parents(name))
            yield AttentionLayer(
                name, module, ancestors, _config(module, ancestors), _is_cross(name, module, ancestors)
            )


def attention_labels(model: nn.Module, self_attention: Mapping[str, bool | None]) -> dict[str, str]:
    """Label of every attention layer of a model, of those too that are not read or not measured.

    A label depends on the names of all layers: whoever labels some of them alone would give another layer's.

    Args:
        model: any module.
        self_attention: layer name → whether it is self-attention, where weights or calls have told; of the others
            names and flags tell.
    """
    return label_layers({layer.name: layer.is_cross for layer in attention_sites(model)}, self_attention)


def label_layers(found: Mapping[str, bool], self_attention: Mapping[str, bool | None]) -> dict[str, str]:
    """Labels as :func:`attention_labels` has them, of layers ``found``: name → whether it is cross-attention."""
    known = {name: own for name, own in self_attention.items() if own is not None}
    return layer_labels(
        list(found), {name for name, crosses in found.items() if not known.get(name, not crosses)}
    )


def _parents(name: str) -> list[str]:
    """Qualified names of the modules that contain one, nearest first, the model itself ("") last."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


def _fits(module: nn.Module) -> bool:
    if find_layout(module) is None:
        return False
    return _ATTENTION.search(type(module).__name__) is not None or uses_interface(module)


def _is_named_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    if _NAMED_ATTENTION.search(type(module).__name__) is None:
        return False
    return _has_weights(module)


def _has_weights(module: nn.Module) -> bool:
    """Whether a module, a child, or a child of a list has a matrix."""
    held = list(module.children())
    own = [module, *held]
    own += [part for child in held if isinstance(child, _LISTS) for part in child.children()]
    return any(parameter.dim() >= 2 for owner in own for parameter in owner.parameters(recurse=False))


def _takes_softmax(module: nn.Module) -> bool:
    """Whether a class of a model's own, or children without weights, name a softmax in what they call."""
    if is_known(module) or isinstance(module, _LISTS) or not _has_weights(module):
        return False
    # What trains is no layer.
    if type(module).forward is nn.Module.forward or hasattr(module, "training_step"):
        return False
    free = [child for child in module.modules() if not any(True for _ in child.parameters())]
    return any(names_softmax(own) for own in (module, *free))


_REACHES: "weakref.WeakKeyDictionary[nn.Module, tuple[list[int], bool]]" = weakref.WeakKeyDictionary()
# Larger modules are networks, and no layers.
_MOST_PROJECTIONS = 24


def reaches_product(module: nn.Module) -> bool:
    """Whether a module, run alone, takes a softmax of a product both sides of which its projections change.

    Found out once for each module and what it contains.
    """
    parts = [id(own) for own in module.modules()]
    known = _REACHES.get(module)
    if known is None or known[0] != parts:
        known = _REACHES[module] = parts, _reaches_product(module)
    return known[1]


def _reaches_product(module: nn.Module) -> bool:
    try:
        bench = Bench(module)
        bench.check_access()
    except UnreadLayer:
        return False
    if len(bench.emitters) + len(bench.loose) < 2 or len(bench.emitters) > _MOST_PROJECTIONS:
        return False
    with quietly(module):
        for own in (bench, Bench(module, is_bare=True)):
            for trial in itertools.islice(own.trials(), 12):
                # Of bare parameters other values than their own, as they may be zero.
                given = {} if own.emitters else varied_parameters(own.loose)
                doubled = {key: 2.0 * values for key, values in given.items()}
                first = own.run(trial, random(0, 1.0), given).products
                second = own.run(trial, random(1, 1.0), doubled).products
                for one, other in zip(first, second, strict=False):
                    sides = ((one.query, other.query), (one.key, other.key))
                    if all(a.shape == b.shape and not torch.equal(a, b) for a, b in sides):
                        return True
    return False


def _config(module: nn.Module, ancestors: tuple[nn.Module, ...]) -> Any:
    for owner in (module, *ancestors):
        config = getattr(owner, "config", None)
        if config is not None and not isinstance(config, nn.Module | Tensor):
            return config
    return None


def _is_cross(name: str, module: nn.Module, ancestors: tuple[nn.Module, ...]) -> bool:
    for flag in ("is_cross_attention", "is_cross_attn"):
        value = getattr(module, flag, None)
        if isinstance(value, bool):
            return value
    # Only what lies below the layer's index counts: a whole model may be called a cross-encoder.
    parts = name.split(".")
    indices = [place for place, part in enumerate(parts) if part.isdigit()]
    near = parts[indices[-1] + 1 :] if indices else parts[-2:]
    owners = (module, *ancestors[: max(len(near) - 1, 0)])
    return any(_CROSS.search(text) for text in (*near, *(type(owner).__name__ for owner in owners)))


_BLOCK_LISTS = (nn.ModuleList, nn.Sequential)
_TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_TAKE_PADDING = (nn.TransformerEncoder, nn.TransformerDecoder, nn.MultiheadAttention, *_TORCH_LAYERS)
PADDING = frozenset({"key_padding_mask", "src_key_padding_mask", "tgt_key_padding_mask"})
"""Arguments of torch's encoders, decoders and attention, ``(batch, tokens)``: true, or not zero, where a token is
padding."""


class Block(NamedTuple):
    """One block in its model.

    Attributes:
        module: the block.
        models: modules around it that are given the mask of the tokens, nearest first: Hugging Face models, and
            what takes a mask of padding as torch's encoders do.
        is_turned: whether its hidden states are ``(tokens, batch, width)``, as in torch's layers by default; None
            where that is not known.
        is_first: it is the first of its stack, so that its input is what comes out of the embedding.
    """

    module: nn.Module
    models: tuple[nn.Module, ...]
    is_first: bool
    is_turned: bool | None = False


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
                "it is in no list of blocks (nn.ModuleList or nn.Sequential), so that no block's output is "
                "known"
            )
            continue
        name, module = found
        if id(module) in placed:
            continue
        placed[id(module)] = name
        stack = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        models = tuple(owner for owner in site.ancestors if _is_model(owner) or takes_padding(owner))
        blocks[name] = Block(module, models, stack not in stacks, _is_turned(module, site.module))
        stacks.add(stack)
    return blocks, without


def _block_of(site: AttentionLayer, own: list[str]) -> tuple[str, nn.Module] | None:
    """The block of one attention layer, by the names of all layers of self-attention."""
    parts = site.name.split(".")
    # Of the ancestors, nearest first: those that are elements of a list.
    candidates: list[tuple[str, nn.Module]] = []
    for depth, module in enumerate(site.ancestors[:-1]):
        if _is_model(module):
            break
        if isinstance(site.ancestors[depth + 1], _BLOCK_LISTS) and not isinstance(module, _BLOCK_LISTS):
            candidates.append((".".join(parts[: len(parts) - 1 - depth]), module))
    for name, module in reversed(candidates):
        if sum(other.startswith(f"{name}.") for other in own) <= 1:
            return name, module
    return candidates[0] if candidates else None


def is_turned(module: nn.Module) -> bool:
    """Whether an attention layer takes ``(tokens, batch, width)``."""
    return isinstance(module, nn.MultiheadAttention) and not module.batch_first


def _is_turned(block: nn.Module, attention: nn.Module) -> bool | None:
    if not is_turned(attention):
        return False
    # Others may turn their tokens for the attention, or not.
    return True if isinstance(block, _TORCH_LAYERS) else None


def takes_padding(module: nn.Module) -> bool:
    """Whether a module is given a mask of padding as torch's encoders and decoders are."""
    return isinstance(module, _TAKE_PADDING)


def _is_model(module: nn.Module) -> bool:
    # Not imported for this: without it there is no model of theirs. FSDP changes the class, not the ancestry.
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def local_heads(module: nn.Module, heads: int) -> slice | None:
    """Which of a layer's query heads this process computes under tensor parallelism.

    To be asked while the layer runs, at its attention call: FSDP2 has gathered its own dimension by then, so
    that what is still sharded is sharded over heads.

    Args:
        module: the attention layer.
        heads: how many query heads the layer has in all.

    Returns:
        The slice of ``range(heads)``, or None where the process computes all of them.

    Raises:
        ValueError: the shards are not whole heads.
    """
    layout = find_layout(module) if any(is_dtensor(own) for own in module.parameters()) else None
    weight: Any = None if layout is None else layout.query.weight(module)
    if not is_dtensor(weight):
        return None
    rows = weight.shape[0]
    start, length = 0, rows
    for dim, placement in enumerate(weight.placements):
        if not placement.is_shard(0):
            continue
        # As torch.chunk cuts: equal pieces but for the last ones.
        piece = -(-length // weight.device_mesh.size(dim))
        offset = min(weight.device_mesh.get_local_rank(dim) * piece, length)
        start, length = start + offset, min(piece, length - offset)
    if length == rows:
        return None
    if start * heads % rows or length * heads % rows:
        raise ValueError(
            f"expected shards of whole heads, got rows {start} to {start + length} of {rows} for {heads} heads: "
            "choose a tensor parallel size that divides the number of heads"
        )
    return slice(start * heads // rows, (start + length) * heads // rows)
