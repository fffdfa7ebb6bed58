"""Read the query and key weights of every attention layer of a model, per head, and batch layers of one shape."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.heads.facts import finding_of
from lightning_qk.heads.layer import LayerReader, layer_reader
from lightning_qk.heads.live_weights import ModuleGone, is_dtensor
from lightning_qk.heads.projections import HeadProjections, InaccessibleWeights, UnreadLayer
from lightning_qk.heads.sites import AttentionLayer, attention_sites, label_layers


class ProjectionReader(Mapping[str, HeadProjections]):
    """The projections of a model, layer by layer, each read when it is asked for.

    A lazy form of :func:`head_projections`: the same names and values, but nothing is kept. Layouts, sizes
    and norms are found out once, in the constructor and whenever the model's modules were replaced; after
    that a layer costs no more than taking its live tensors, and never waits for the device. Weights that
    are sharded (FSDP, FSDP2, tensor parallel) are gathered by the access: read layer by layer, no more than
    one layer's projections are whole at a time, and every process must read the same layers in the same order.

    Args:
        model: any module that contains Hugging Face transformers, such as a LightningModule.
        fold_norm: see :func:`head_projections`.
        root: the outermost module around ``model``, where there is one, such as ``trainer.strategy.model``:
            FSDP's first version may be wrapped around the whole.
        allow_empty: a model of which no layer can be read is taken too: its layers may be learnt from calls.

    Attributes:
        layers: qualified name → what is known of a layer without its values.
        refusals: qualified name → why a layer is left out: a `NotTokenAttention` has no softmax over tokens.
        found: qualified name → whether it is cross-attention, of all attention layers.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model contains no attention, or none that can be read, and not ``allow_empty``.
    """

    layers: dict[str, LayerReader]
    refusals: dict[str, UnreadLayer]
    found: dict[str, bool]

    def __init__(
        self,
        model: nn.Module,
        *,
        fold_norm: bool = False,
        root: nn.Module | None = None,
        allow_empty: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}: pass the model itself")
        self.fold_norm = fold_norm
        self._allow_empty = allow_empty
        self._model = weakref.ref(model)
        self._root = None if root is None else weakref.ref(root)
        # Sharded layers that other processes gather now, in this order.
        self._owed: list[str] = []
        self._plan(model)

    def __getitem__(self, name: str) -> HeadProjections:
        layer = self.layers[name]
        if name in self._owed:
            self._owed.remove(name)
        return layer.copy() if layer.is_flat else layer.read()

    @contextmanager
    def taken(self, name: str) -> Iterator[LayerReader]:
        """A layer to be read in another way within this block, its parameters whole; see :meth:`to_the_end`."""
        if name in self._owed:
            self._owed.remove(name)
        layer = self.layers[name]
        with layer.gathered():
            yield layer

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def unread(self) -> dict[str, str]:
        """Qualified name → why a layer is left out, as a clause."""
        return {name: str(reason) for name, reason in self.refusals.items()}

    @property
    def labels(self) -> dict[str, str]:
        """Label of every attention layer of the model, of those too that are not read."""
        return label_layers(self.found, {name: own.self_attention for name, own in self.layers.items()})

    @property
    def model(self) -> nn.Module:
        """The model.

        Raises:
            ValueError: it is gone.
        """
        model = self._model()
        if model is None:
            raise ValueError("expected a model that is alive, got one that is gone: keep a reference to it")
        return model

    def refresh(self) -> bool:
        """Plan again if modules of the model were replaced (an adapter merged, say), or what layers keep beside
        their parameters changed what they compute (a temperature, say); whether that was so.

        Values, devices, types and ties of the weights are live in any case.

        Raises:
            ValueError: nothing can be read any more.
        """
        model = self.model
        if self._identity == list(_identity(model)):
            return self._renew()
        self._plan(model)
        return True

    def _renew(self) -> bool:
        """Plans layers again if their own numbers changed; returns whether any is read differently now."""
        stale = [name for name, plan in self.layers.items() if not plan.is_current()]
        if not stale:
            return False
        is_other = False
        sites = {site.name: site for site in attention_sites(self.model)}
        if not sites.keys() >= set(stale):  # layers that are kept under names of before
            self._plan(self.model)
            return True
        for name in stale:
            before = self.layers[name]
            self._compile(sites[name], self._wrappers(self.model))
            after = self.layers.get(name)
            if after is not None and before.reads_as(after):
                self.layers[name] = before
            else:
                is_other = True
        return is_other

    @contextmanager
    def to_the_end(self, names: Iterable[str]) -> Iterator[None]:
        """Gather every sharded layer that is to be read within this block, also where the block raises.

        Gathering is collective: a process that gives up between two layers would leave the others waiting. What
        it has not read is read at the block's end, and dropped.

        Args:
            names: in the order in which they are read; one that is read twice, twice.
        """
        self._owed = [name for name in names if name in self.layers and self.is_sharded(name)]
        try:
            yield
        finally:
            owed, self._owed = self._owed, []
            for name in owed:
                with suppress(Exception):
                    self[name]

    def is_sharded(self, name: str) -> bool:
        """Whether reading a layer gathers its weights from other processes."""
        return self.layers[name].is_sharded()

    def gathers(self) -> bool:
        """Whether reading gathers weights of some layer; of replaced modules, whether any of the model would."""
        try:
            return any(layer.is_sharded() for layer in self.layers.values())
        except ModuleGone:
            return any(is_dtensor(parameter) for parameter in self.model.parameters())

    def _plan(self, model: nn.Module) -> None:
        self._identity = list(_identity(model))
        self.layers, self.refusals = {}, {}
        wrappers = self._wrappers(model)
        sites = list(attention_sites(model))
        self.found = {site.name: site.is_cross for site in sites}
        for site in sites:
            self._compile(site, wrappers)
        if not self.layers and not self._allow_empty:
            raise ValueError(self._why_nothing_is_read(type(model).__name__))

    def _compile(self, site: AttentionLayer, wrappers: tuple[nn.Module, ...]) -> None:
        """Find out how a layer is read, or why it cannot be."""
        try:
            self.layers[site.name] = layer_reader(site, self.fold_norm, wrappers)
            self.found[site.name] = not self.layers[site.name].self_attention
        except UnreadLayer as reason:
            self.layers.pop(site.name, None)
            # Without its frames, which would keep the model alive.
            self.refusals[site.name] = type(reason)(str(reason))

    def _why_nothing_is_read(self, kind: str) -> str:
        reasons = [f"{name or kind} because {reason}" for name, reason in self.refusals.items()]
        if not reasons:
            return (
                f"expected a model that contains transformer attention, found none in {kind}: build the network "
                "in __init__ or configure_model before it is read, or leave out what reads its attention"
            )
        for name, reason in self.refusals.items():
            if isinstance(reason, InaccessibleWeights):
                return (
                    f"expected weights that this process can read, got {len(reasons)} attention layers in {kind} "
                    f"of which it can read none: of {name or kind}, {reason}"
                )
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        return (
            f"expected at least one attention layer of a known layout, found {len(reasons)} in {kind} of which "
            f"none can be read ({'; '.join(reasons[:3])}{more}): pass a model whose attention is a softmax over "
            "q · k of its own projections"
        )

    def _wrappers(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """The modules between the root and the model, nearest first, the root last."""
        root = None if self._root is None else self._root()
        if root is None or root is model:
            return ()
        path = next((name for name, module in root.named_modules() if module is model), None)
        if path is None:
            return ()
        parts = path.split(".")
        return tuple(root.get_submodule(".".join(parts[:end])) for end in range(len(parts) - 1, -1, -1))


def _identity(model: nn.Module) -> Iterator[int]:
    """Changes when modules of a model, or their classes, change."""
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is not None:
            yield id(module)
            yield id(type(module))
            finding = finding_of(module)
            if finding is not None:
                yield id(finding)
            stack.extend(module._modules.values())


_READERS: "weakref.WeakKeyDictionary[nn.Module, ProjectionReader]" = weakref.WeakKeyDictionary()


def kept_reader(model: nn.Module) -> ProjectionReader:
    """The reader of a model, made at the first call and kept as long as the model lives.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model contains no attention, or none that can be read.
    """
    reader = _READERS.get(model) if isinstance(model, nn.Module) else None
    if reader is None:
        reader = ProjectionReader(model)
        _READERS[model] = reader
    else:
        reader.refresh()
    return reader


def head_projections(model: nn.Module, *, fold_norm: bool = False) -> dict[str, HeadProjections]:
    """Read the query and key weights of every attention layer, split into heads.

    The weights are found by the names and shapes of the layers' own modules, wherever in the model they hang.
    Nothing is run for layouts that are known; a layer of none is run alone on a copy, to see which rows of its
    projections reach q and k. Projections with adapters and quantized ones are read as the map that they apply.
    A layer that cannot be read is left out; `unread` names it with the reason. Sharded
    weights are gathered, all of them: :class:`ProjectionReader` gathers one layer at a time.

    Args:
        model: any module that contains Hugging Face transformers, such as a LightningModule.
        fold_norm: multiply the gain of the norm that feeds a layer into its weights (for LayerNorm, the
            removal of the mean too), and its offset into the biases. The weights then act on normalized
            hidden states. Only a norm that provably feeds the layer is folded
            (`HeadProjections.norm_folded` tells): that of pre-norm self-attention. Post-norm layers and
            cross-attention are given as they are.

    Returns:
        Qualified module name to projections, in module order, a shared module once. The tensors are
        differentiable functions of the live parameters: views, save where a norm is folded in, an adapter is
        added, or a DTensor is gathered. Copies of parameters that FSDP's first version flattens are not
        differentiable.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model contains no attention, or none that can be read.

    Example:
        >>> from transformers import AutoConfig, AutoModel
        >>> config = AutoConfig.for_model("bert", num_hidden_layers=1, hidden_size=32, num_attention_heads=4)
        >>> for name, heads in head_projections(AutoModel.from_config(config)).items():
        ...     print(name, tuple(heads.query.shape), tuple(heads.key.shape))
        encoder.layer.0.attention.self (4, 8, 32) (4, 8, 32)
    """
    return dict(ProjectionReader(model, fold_norm=fold_norm))


def unread(model: nn.Module) -> dict[str, str]:
    """Name the attention layers that `head_projections` leaves out.

    Args:
        model: any module.

    Returns:
        Qualified module name to the reason, as a clause that begins with what the layer is or has, in module
        order. Empty where every layer is read.
    """
    return ProjectionReader(model, allow_empty=True).unread


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Find the attention layers of a model, those that cannot be read included.

    Args:
        model: any module.

    Returns:
        Qualified module name to module, in module order.
    """
    return {site.name: site.module for site in attention_sites(model)}


# Layers are copied when they are stacked, and some when they are read: of large models no more than this many
# numbers at a time.
LARGEST_BATCH = 2**26


class LayerBatch(NamedTuple):
    """Projections of layers whose shapes agree.

    Attributes:
        names: qualified names of the layers.
        query: shape ``(layers, heads, d_head, d_query)``.
        key: shape ``(layers, kv_heads, d_head, d_key)``.
        scaling: softmax scales, shape ``(layers,)``.
    """

    names: tuple[str, ...]
    query: Tensor
    key: Tensor
    scaling: Tensor


def layer_batches(
    projections: Mapping[str, HeadProjections], names: Iterable[str] | None = None
) -> Iterator[LayerBatch]:
    """Layers grouped by shape, dtype and device, each group stacked; differentiable.

    Of a :class:`~lightning_qk.heads.reader.ProjectionReader`, layers are read in the parts of
    :func:`read_together`, so that memory is bounded if the caller keeps none (a loop's variable is deleted at
    its end); on every process in the same order.

    Args:
        projections: the layers by name.
        names: which of them; None for all.
    """
    names = list(projections if names is None else names)
    parts: Iterable[list[str]] = [names]
    if isinstance(projections, ProjectionReader):
        parts = read_together(projections, names)
    for part in parts:
        yield from _stacked({name: projections[name] for name in part})


def read_together(reader: ProjectionReader, names: Iterable[str]) -> Iterator[list[str]]:
    """Layers in parts that are read at once, each of its own kind.

    First all whose weights are views, then those whose weights are made by reading (adapters, quantized
    weights), in parts of bounded size, then each sharded layer alone: no more than one is whole at a time.
    """
    views: list[str] = []
    made: list[list[str]] = [[]]
    alone: list[str] = []
    size = 0
    for name in names:
        layer = reader.layers[name]
        if layer.is_sharded():
            alone.append(name)
        elif layer.is_view():
            views.append(name)
        else:
            if made[-1] and size + layer.numel > LARGEST_BATCH:
                made.append([])
                size = 0
            made[-1].append(name)
            size += layer.numel
    for part in (views, *made, *([name] for name in alone)):
        if part:
            yield part


def _stacked(heads: Mapping[str, HeadProjections]) -> Iterator[LayerBatch]:
    for names in group_layers(heads, lambda head: (head.query, head.key)):
        yield LayerBatch(
            names=tuple(names),
            query=stack([heads[name].query for name in names]),
            key=stack([heads[name].key for name in names]),
            scaling=torch.tensor(
                [heads[name].scaling for name in names], device=heads[names[0]].query.device
            ),
        )


def group_layers(
    layers: Mapping[str, HeadProjections], tensors: Callable[[HeadProjections], Sequence[Tensor]]
) -> list[list[str]]:
    """Names of layers whose tensors agree in shape, dtype and device, in batches of bounded size."""
    groups: dict[tuple[object, ...], list[list[str]]] = {}
    for name, head in layers.items():
        own = tensors(head)
        batches = groups.setdefault(tuple((t.shape, t.dtype, t.device) for t in own), [[]])
        if batches[-1] and (len(batches[-1]) + 1) * sum(t.numel() for t in own) > LARGEST_BATCH:
            batches.append([])
        batches[-1].append(name)
    return [names for batches in groups.values() for names in batches]


def stack(matrices: Sequence[Tensor]) -> Tensor:
    """As torch.stack, but matrices that are stored by columns stay so, which is several times faster."""
    if len(matrices) == 1:
        return matrices[0].unsqueeze(0)
    if all(matrix.stride(-2) == 1 and matrix.stride(-1) != 1 for matrix in matrices):
        return torch.stack([matrix.mT for matrix in matrices]).mT
    return torch.stack(list(matrices))
