"""Read a checkpoint's attention layers one after the other, and what their spectra are."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.functional.spectrum import Support
from lightning_qk.heads.facts import kv_source
from lightning_qk.heads.layer import LayerReader, layer_reader
from lightning_qk.heads.position import ADDED_TO_LOGITS
from lightning_qk.heads.projections import HeadProjections, UnreadLayer
from lightning_qk.heads.sites import AttentionLayer, attention_labels, attention_sites
from lightning_qk.inspect.documents import BadInput
from lightning_qk.inspect.layer_values import (
    OF_ANY_ATTENTION,
    SOLVED_STATISTICS,
    SUMMED_STATISTICS,
    TRACE_STATISTICS,
    cross_core,
    is_wide,
    solved_values,
    summed_values,
    trace_values,
)
from lightning_qk.inspect.matching import Weights
from lightning_qk.inspect.skeleton import Placed, build_skeleton
from lightning_qk.inspect.sources import Checkpoint
from lightning_qk.metrics.eigenvalues import Cores, EigenvalueWorker
from lightning_qk.record.history import History, LayerShape, RunRecord
from lightning_qk.record.snapshots import Snapshots

_LARGEST_NORM = 1 << 20
Progress = Callable[[int, int], None]
"""Called with how many layers were read, and of how many."""


NOT_VERIFIED = "not verified: weights only"
"""No forward pass was run: nothing but the model's class says how its weights are used."""


@dataclass
class Reading:
    """What was read from one checkpoint.

    Attributes:
        title: what the checkpoint is called.
        step: of training, where it is known.
        labels: of the layers, in the model's order.
        names: their qualified names.
        heads: how many each has.
        self_attention: whether each takes queries and keys from the same tokens; others have singular values only.
        values: statistic → one number a head of all layers, shape ``(sum(heads),)``; NaN where it has none.
        eigenvalues: label → eigenvalues, complex ``(heads, d_head)``; empty where moments alone were asked for.
        shapes: label → widths and softmax scale.
        profile: label → measured linear share by relative position of the key, ``(heads, bins)``; empty without
            text.
        layer_values: statistic → one number a layer, such as those of its heads summed; NaN where it has none.
        attention: the same as ``values`` of what was measured on text, or empty.
        predicted: the same of what moments of tokens predict of it.
        facts: what else to say of the model.
        notes: sentences that a reader has to know.
        verification: whether what was read of the layers was compared with what a forward pass of the
        model computes.
    """

    title: str
    step: int | None
    labels: list[str]
    names: list[str]
    heads: list[int]
    self_attention: list[bool]
    values: dict[str, Tensor]
    eigenvalues: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, LayerShape] = field(default_factory=dict)
    profile: dict[str, Tensor] = field(default_factory=dict)
    layer_values: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, Tensor] = field(default_factory=dict)
    predicted: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    verification: str = NOT_VERIFIED

    def split(self, flat: Tensor) -> list[Tensor]:
        """One tensor a layer."""
        return list(flat.split(self.heads))

    def has_value(self, statistic: str, layer: int) -> bool:
        """Whether a layer has the statistic when all is well."""
        for values in (self.attention, self.predicted):
            if statistic in values:
                return bool(self.split(values[statistic])[layer].isfinite().any())
        return self.self_attention[layer] or statistic in OF_ANY_ATTENTION


def iterate_layers(
    model: nn.Module, weights: Weights, *, fold_norm: bool = True
) -> Iterator[tuple[AttentionLayer, LayerReader | str, HeadProjections | None]]:
    """Read the attention layers of a skeleton one by one, each with its own weights in place.

    Args:
        model: from :func:`~lightning_qk.inspect.skeleton.build_skeleton`.
        weights: of the checkpoint.
        fold_norm: see :func:`~lightning_qk.head_projections`.

    Yields:
        The layer and its place, how it is read, and its projections in float32 at least; or the reason why it
        cannot be read, and None.

    Raises:
        BadInput: the checkpoint lacks the layer's weights, or holds others.
    """
    for site in list(attention_sites(model)):
        _check_shapes(site, weights)
        with _stand_ins(model, site, fold_norm) as placed:
            try:
                plan = layer_reader(site, fold_norm)
            except UnreadLayer as reason:
                yield site, str(reason), None
                continue
            _load(plan, placed, weights)
            with torch.no_grad():
                yield site, plan, plan.read()


def _check_shapes(site: AttentionLayer, weights: Weights) -> None:
    """Compare a layer's parameters with the tensors that are there before memory is taken for them.

    Raises:
        BadInput: a tensor has another shape than the model expects.
    """
    for own, parameter in site.module.named_parameters():
        name = f"{site.name}.{own}" if site.name else own
        there = weights.shape(name)
        if there is not None and there != tuple(parameter.shape):
            raise BadInput(
                f"expected {name!r} of shape {tuple(parameter.shape)}, got {there}: the checkpoint's "
                "configuration is that of another model"
            )


def _stand_ins(model: nn.Module, site: AttentionLayer, fold_norm: bool) -> Placed:
    """Stand-ins for what is run to read a layer: itself, the layer whose keys it reuses, the norm in front."""
    modules = [site.module]
    with suppress(UnreadLayer):  # the plan says so
        lender = kv_source(site)
        if lender is not None:
            modules.append(lender.module)
    if fold_norm:
        # Norms are siblings of the layer; other siblings do not matter, and embeddings are gigabytes.
        modules += [
            child
            for owner in site.ancestors[:3]
            if not isinstance(owner, nn.ModuleList | nn.ModuleDict)
            for child in owner.children()
            if not any(True for _ in child.children())
            and all(parameter.numel() <= _LARGEST_NORM for parameter in child.parameters())
        ]
    return Placed(model, modules)


def _load(plan: LayerReader, placed: Placed, weights: Weights) -> None:
    """Put the weights that a plan reads in their places, and the biases beside them."""
    wanted = [placed.names_of(parameter) for parameter in plan.parameters()]
    first = [names for names in wanted if names]
    beside = {
        f"{name.rpartition('.')[0]}.{own}".lstrip(".")
        for names in first
        for name in names
        for own in ("bias", f"{name.rpartition('.')[2].removesuffix('_weight')}_bias")
    }
    extra = [name for side in (plan.query, plan.key) for name in _own_biases(plan, side, placed)]
    known = {name for names in first for name in names}
    also = [[name] for name in sorted(beside | set(extra)) if name in placed.names and name not in known]
    with weights.reading() as load:
        for names in first + [names for names in also if weights.has(names[0])]:
            placed.put(names[0], load(names, placed.shape(names[0])))


def _own_biases(plan: LayerReader, side: Any, placed: Placed) -> list[str]:
    """Vectors in the layer that a side's weights are in."""
    path = plan.name if side is plan.query else plan.key_layer or plan.name
    inside = f"{path}." if path else ""
    added = [f"{inside}{name}" for name in side.added if f"{inside}{name}" in placed.names]
    return added + [
        name
        for name in placed.names
        if name.startswith(inside) and placed.shape(name).numel() == max(placed.shape(name), default=1)
    ]


def read_checkpoint(
    checkpoint: Checkpoint,
    *,
    support: Support = "model",
    fold_norm: bool = True,
    eigenvalues: bool = True,
    summed: bool = False,
    trust: bool = False,
    progress: Progress | None = None,
) -> tuple[Reading, nn.Module, Weights]:
    """Read a checkpoint's spectra, one layer in memory at a time.

    Args:
        checkpoint: from :func:`~lightning_qk.inspect.sources.open_source`.
        support: what spectra are averaged over, see :func:`~lightning_qk.functional.qk_moments`.
        fold_norm: fold the gain of the norm that feeds a layer into its weights, where one does.
        eigenvalues: solve the eigenproblems; False leaves ``SOLVED_STATISTICS`` of
            ``lightning_qk.inspect.layer_values`` out.
        summed: statistics of each layer's heads summed also where they take long.
        trust: run code that comes with the model.
        progress: called after every layer.

    Returns:
        What was read, the skeleton and the weights.

    Raises:
        BadInput: the model holds no attention that can be read, or the checkpoint lacks weights.
    """
    with _naming(checkpoint):
        model = build_skeleton(
            checkpoint.config, trust=trust, tensors=checkpoint.tensors, size=checkpoint.size
        )
        weights = checkpoint.weights(model)
        layers = [site.name for site in attention_sites(model)]
        weights.check_depth(layers)
        found = _Found(support, eigenvalues, summed)
        try:
            for count, (site, plan, heads) in enumerate(
                iterate_layers(model, weights, fold_norm=fold_norm), 1
            ):
                if isinstance(plan, str) or heads is None:
                    found.unread[site.name] = str(plan)
                else:
                    found.add(site.name, plan, heads)
                del heads
                if progress is not None:
                    progress(count, len(layers))
            found.collect()
        finally:
            found.worker.close()
        checkpoint.notes = [*weights.notes(layers), *checkpoint.notes]
        return _reading(checkpoint, model, found, fold_norm), model, weights


@contextmanager
def _naming(checkpoint: Checkpoint) -> Iterator[None]:
    """Adds the checkpoint's name to errors that lack it."""
    try:
        yield
    except BadInput as error:
        if any(part in str(error) for part in checkpoint.title.split(" on ")):
            raise
        raise BadInput(f"{error} (of {checkpoint.title})") from error


class _Found:
    """What was read so far; a layer's eigenproblems are solved while the next one is read."""

    def __init__(self, support: Support, eigenvalues: bool, summed: bool) -> None:
        self.support, self.eigenvalues, self.summed = support, eigenvalues, summed
        self.plans: dict[str, LayerReader] = {}
        self.unread: dict[str, str] = {}
        self.values: dict[str, dict[str, Tensor]] = {}
        self.sums: dict[str, dict[str, float] | None] = {}
        self.spectra: dict[str, Tensor] = {}
        self.facts: dict[str, set[str]] = {"positions": set(), "norms": set()}
        self.worker = EigenvalueWorker(one_core=True)
        self._waiting: tuple[str, dict[str, Tensor], Tensor | None, int] | None = None

    def add(self, name: str, plan: LayerReader, heads: HeadProjections) -> None:
        """Read one layer, whose weights are in place."""
        self.plans[name] = plan
        if heads.position:
            self.facts["positions"].add(heads.position)
        if heads.qk_norm:
            self.facts["norms"].add("between projections and dot product")
        moments: dict[str, Tensor] = {}
        core: Cores | None = None
        energies: Tensor | None = None
        if heads.self_attention:
            directions = self.summed or not is_wide(heads)
            moments, core, energies = trace_values(heads, self.support, directions=directions)
            self.sums[name] = summed_values(heads, always=self.summed)
        elif self.eigenvalues:
            core = cross_core(heads)
        self.values[name] = moments
        if self.eigenvalues and core is not None:
            self.collect()
            self.worker.submit(len(self.plans), [core])
            self._waiting = name, moments, energies, heads.query.shape[-1]

    def collect(self) -> None:
        """Wait for the layer that is being solved."""
        solved = self.worker.collect()
        if solved is None or self._waiting is None:
            return
        name, moments, energies, width = self._waiting
        (own,) = solved.spectra.values()
        if own.is_complex():
            self.spectra[name] = own
        energies = own.square() if energies is None else energies
        self.values[name] = moments | solved_values(own, moments, energies, width)

    def flat(self, statistic: str) -> Tensor:
        """Values of all heads; NaN where a layer has none."""
        parts = [
            self.values[name].get(statistic, torch.full((plan.heads,), torch.nan)).float()
            for name, plan in self.plans.items()
        ]
        return torch.cat(parts)


def _reading(checkpoint: Checkpoint, model: nn.Module, found: _Found, fold_norm: bool) -> Reading:
    plans, unread, facts = found.plans, found.unread, found.facts
    kind = type(model).__name__
    if not plans:
        if unread:
            name, reason = next(iter(unread.items()))
            raise BadInput(
                f"expected attention layers that can be read, got {len(unread)} in {checkpoint.title} "
                f"({kind}), none of which is: of {name or kind}, {reason}"
            )
        raise BadInput(
            f"expected a model with attention layers, got {checkpoint.title} ({kind}), which has none"
        )
    every = attention_labels(model, {name: plan.self_attention for name, plan in plans.items()})
    labels = {name: every[name] for name in plans}
    notes = list(checkpoint.notes)
    notes += [f"{name} is not read: {reason}" for name, reason in unread.items()]
    if facts["positions"] & ADDED_TO_LOGITS:
        notes.append(
            f"positions are added to the logits ({', '.join(sorted(facts['positions'] & ADDED_TO_LOGITS))}): "
            "these are the spectra of the content part, q · k"
        )
    reading = Reading(
        title=checkpoint.title,
        step=checkpoint.step,
        labels=list(labels.values()),
        names=list(plans),
        heads=[plan.heads for plan in plans.values()],
        self_attention=[plan.self_attention for plan in plans.values()],
        values={
            name: found.flat(name)
            for name in (*TRACE_STATISTICS, *SOLVED_STATISTICS * found.eigenvalues)
            if name != "directionality" or any(name in own for own in found.values.values())
        },
        eigenvalues={labels[name]: own for name, own in found.spectra.items()},
        shapes={
            labels[name]: LayerShape(plan.sizes.d_head, plan.width[0], float(plan.scaling))
            for name, plan in plans.items()
        },
        facts={**_facts(model, plans, facts), "Norms in front": _folded(plans, fold_norm)},
        notes=notes,
    )
    sums = [found.sums.get(name) for name in plans]
    if any(sums):
        reading.layer_values = {
            statistic: torch.tensor([math.nan if own is None else own[statistic] for own in sums])
            for statistic in SUMMED_STATISTICS
        }
    elif any(reading.self_attention):
        reading.notes.append(
            "directionality, and symmetry of the heads summed, are left out of layers this wide: add --summed"
        )
    reading.notes += _not_finite(reading)
    return reading


def _facts(model: nn.Module, plans: dict[str, LayerReader], facts: dict[str, set[str]]) -> dict[str, str]:
    def different(numbers: Iterable[int]) -> str:
        return ", ".join(map(str, dict.fromkeys(numbers)))

    return {
        "Model": type(model).__name__,
        "Layers": str(len(plans)),
        "Heads": different(plan.heads for plan in plans.values()),
        "Key heads": different(plan.sizes.kv_heads for plan in plans.values()),
        "Width of a head": different(plan.sizes.d_head for plan in plans.values()),
        "Width of the model": different(plan.width[0] for plan in plans.values()),
        "Positions": ", ".join(sorted(facts["positions"])) or "unknown",
        **({"Norms": ", ".join(facts["norms"])} if facts["norms"] else {}),
    }


def _folded(plans: dict[str, LayerReader], fold_norm: bool) -> str:
    """Whether norms that feed layers are part of the weights, in a few words."""
    count = sum(plan.norm_folded for plan in plans.values())
    if not fold_norm:
        return "left out, as asked"
    if not count:
        return "none feeds a layer that can be folded"
    return "folded into the weights" + ("" if count == len(plans) else f" of {count} of {len(plans)} layers")


def _not_finite(reading: Reading) -> list[str]:
    """Name the layers whose weights are not finite."""
    found = []
    for layer, part in enumerate(reading.split(reading.values["frobenius_sq"])):
        bad = [str(head) for head, ok in enumerate(part.isfinite().tolist()) if not ok]
        if bad and reading.self_attention[layer]:
            found.append(
                f"{reading.names[layer]} (head {', '.join(bad[:8])}{' and more' if len(bad) > 8 else ''})"
            )
    return [f"weights are not finite in {name}" for name in found]


def record_of(readings: list[Reading], *, side_by_side: bool = False) -> RunRecord:
    """A run's record of checkpoints with the same layers, with the spectra of some of them.

    Args:
        readings: of one model, by step; or of several models.
        side_by_side: they are different models, in the order in which they are shown.

    Raises:
        BadInput: their layers differ.
    """
    first, newest = readings[0], readings[-1]
    for other in readings[1:]:
        check_same_layers(first, other)
    titles = ", ".join(reading.title for reading in readings)
    subject = {"Checkpoints": titles} if side_by_side else {"Checkpoint": newest.title}
    record = RunRecord(info={**subject, **newest.facts, "Spectra": newest.verification})
    record.shapes = dict(newest.shapes)
    points = max(len(readings), 2)
    parts = {"spectrum": "values", "attention": "attention", "pred": "predicted"}
    record.histories = {
        group: History(first.labels, first.heads, points)
        for group, part in parts.items()
        if any(getattr(reading, part) for reading in readings)
    }
    spectra, profiles = Snapshots(points if side_by_side else 4), Snapshots(points)
    for place, reading in enumerate(readings):
        step = place if side_by_side or reading.step is None else reading.step
        if side_by_side:
            record.points[step] = reading.title
        elif len(readings) == 1 and reading.step is None:
            record.points[step] = "this checkpoint"
        for group, history in record.histories.items():
            if values := getattr(reading, parts[group]):
                history.append(step, values)
        if reading.eigenvalues:
            spectra.append(step, reading.eigenvalues)
        if reading.profile:
            profiles.append(step, reading.profile)
    record.eigenvalues = newest.eigenvalues
    record.eigenvalues_step = step if newest.eigenvalues else None
    kept = {"eigenvalues": spectra, "linear_profile": profiles}
    record.snapshots = {kind: own for kind, own in kept.items() if len(own)}
    record.notes = list(dict.fromkeys(note for reading in readings for note in reading.notes))
    return record


def check_same_layers(first: Reading, other: Reading) -> None:
    """Raises unless two readings have the same layers and heads.

    Raises:
        BadInput: they differ.
    """
    if (first.labels, first.heads) == (other.labels, other.heads):
        return
    raise BadInput(
        f"expected models with the same layers and heads, got {len(first.labels)} layers of "
        f"{sorted(set(first.heads))} heads in {first.title} and {len(other.labels)} of "
        f"{sorted(set(other.heads))} in {other.title}: inspect them one by one"
    )
