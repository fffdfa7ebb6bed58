"""Check, while a model runs, whether what was read of its layers is what their attention received."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk._printable import one_line
from lightning_qk.architecture.dry_run import shadow
from lightning_qk.architecture.source_code import is_known
from lightning_qk.capture.call import is_recomputation
from lightning_qk.capture.capture import AttentionCapture
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.capture.hooks.compiled import is_compiled
from lightning_qk.capture.hooks.modules import hook_after, hook_before, would_notice
from lightning_qk.heads.facts import Finding, settle
from lightning_qk.heads.inferred_layout import find_rows
from lightning_qk.heads.layer import LayerReader, layer_reader
from lightning_qk.heads.layouts import fitting_layouts
from lightning_qk.heads.projection import Side
from lightning_qk.heads.projections import UnreadLayer
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.heads.sites import AttentionLayer, attention_sites
from lightning_qk.heads.trials import Trial, recorded_trials
from lightning_qk.verification.compare import Added, Match, beyond, compare
from lightning_qk.verification.vectors import tolerance

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a layer's forward, by position and by name."""

# Tensors that are kept of one call of a layer.
_MOST = 48
# Relative error of the softmax scale beyond which it was read wrong.
_SCALING = 1e-2


class Status(Enum):
    """What a check found of one layer."""

    VERIFIED = "verified"
    REREAD = "verified, read from the call"
    DIFFERS = "differs"
    UNCHECKED = "not checked"


class Verified(NamedTuple):
    """What a check found of one layer.

    Attributes:
        status: whether what was read is what the model computes.
        query: largest relative difference of a head's queries from ``W x + b``; NaN where they were not compared.
            Under a rotation by position it is that of ``q·q``, ``k·k`` and ``q·k``.
        key: likewise of its keys.
        reason: what differs, or why nothing was compared; empty for verified layers.
        self_attention: whether queries and keys were computed from the same tensor; None where that was not seen.
    """

    status: Status
    query: float
    key: float
    reason: str = ""
    self_attention: bool | None = None

    @property
    def ok(self) -> bool:
        """Whether the layer is verified."""
        return self.status in (Status.VERIFIED, Status.REREAD)


def unchecked(reason: str) -> Verified:
    """What is found where nothing was compared."""
    return Verified(Status.UNCHECKED, float("nan"), float("nan"), reason)


class SelfCheck:
    """Compares, at the first attention call of every layer, what was read with the q and k that are there.

    Forward hooks see what enters the layers and their parts, and a capture sees queries and keys as they are
    multiplied; both are taken away again by :meth:`remove`. Nothing that the model computes is changed. A layer
    that was not read, or wrongly, is read again by running it alone as it was called, and compared again.

    Models of torch.compile are left as they are, and not checked, and neither are weights that are sharded when
    the attention is called.

    Args:
        model: any module.
        reader: of the model.

    Attributes:
        verdicts: qualified layer name → what was found, of the layers that were called.
        findings: qualified layer name → how it has to be read, of those that were read again.
    """

    def __init__(self, model: nn.Module, reader: ProjectionReader) -> None:
        self._reader, self._model = reader, model
        self._is_compiled = False
        self._places = {site.name: site for site in attention_sites(model)}
        self._sites = {name: site.module for name, site in self._places.items()}
        self._calls: dict[str, _Call] = {name: _Call() for name in self._sites}
        self.verdicts: dict[str, Verified] = {}
        self.findings: dict[str, Finding] = {}
        self._plans: dict[str, LayerReader] = {}
        self._reasons: dict[str, str] = {}
        names = {module: name for name, module in self._sites.items()}
        self._capture = AttentionCapture(names, self._receive, model=model, eager=True, operands=True)
        self._handles: list[Any] = []

    def install(self) -> None:
        """Begin to look at forwards."""
        if self._handles:
            return
        self._is_compiled = is_compiled(self._model)
        if self._is_compiled:
            return  # hooks would cause one more compilation of the graph
        for name, module in self._sites.items():
            if any(would_notice(part) for part in module.modules()):
                continue  # its capture knows what enters it, or nothing is known
            call = self._calls[name]
            self._handles.append(hook_before(module, call.enter))
            for part in module.modules():
                if part is not module:
                    self._handles.append(hook_before(part, call.enter_part))
                    self._handles.append(hook_after(part, call.leave_part))
        self._capture.install()
        self._capture.enabled = True

    def remove(self) -> None:
        """Remove all hooks and free the tensors."""
        self._capture.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for call in self._calls.values():
            call.clear()

    @contextmanager
    def looking(self) -> Iterator["SelfCheck"]:
        """Look at the forwards in this block."""
        self.install()
        try:
            yield self
        finally:
            self.remove()

    def conclude(self) -> dict[str, Verified]:
        """What was found of every layer, in the model's order; those that were not called included."""
        found = {}
        for name in self._sites:
            verdict = self.verdicts.get(name)
            problem = self._capture.problems.get(name)
            if verdict is not None and verdict.status is Status.DIFFERS and problem is not None:
                verdict = unchecked(problem)  # the call that was compared was another one
            if verdict is None:
                silent = "the model is compiled" if self._is_compiled else "its attention was not called"
                verdict = unchecked(self._reader.unread.get(name) or problem or silent)
            found[name] = verdict
        return found

    def settle(self, verdicts: Mapping[str, Verified]) -> None:
        """Let all readers of the model know what was found: layers that differ are left out.

        Args:
            verdicts: as :meth:`conclude` gives them, or as several processes agreed.
        """
        for name, verdict in verdicts.items():
            finding = self.findings.get(name, Finding()) if verdict.status is Status.REREAD else Finding()
            if verdict.status is Status.DIFFERS:
                finding = Finding(reason=verdict.reason)
            plan = self._plans.get(name) or self._reader.layers.get(name)
            if verdict.ok and plan is not None:
                finding = finding._replace(self_attention=_decided(plan, verdict.self_attention))
            if finding != Finding():
                settle(self._sites[name], finding)

    def _receive(self, name: str, call: CapturedCall) -> None:
        before = self.verdicts.get(name)
        if before is not None and before.ok:
            return
        kept = self._calls[name]
        try:
            found = self._check(name, call, kept)
        except Exception as error:
            found = unchecked(f"comparing raised {type(error).__name__}: {one_line(error)}")
        # A layer may attend several times, to other streams by other weights: one explained call is enough.
        if before is None or found.ok:
            self.verdicts[name] = found
        if found.ok:
            kept.clear(is_done=True)

    def _check(self, name: str, call: CapturedCall, kept: "_Call") -> Verified:
        operands = call.operands
        if operands is None:
            return unchecked("it is not known which operand of its softmax is the query and which the key")
        if any(hasattr(operand, "to_local") for operand in operands):
            return unchecked("its queries are spread over processes")
        seen = _Seen(call, operands, (*call.inputs, *kept.inputs), kept.has_parts or bool(call.inputs))
        plan = self._reader.layers.get(name)
        first = None if plan is None else _compare(plan, seen)
        if first is not None and first.status is not Status.DIFFERS:
            return first
        again = None if kept.arguments is None else self._read_again(name, seen, kept.arguments)
        if again is not None:
            return again
        unread = self._reasons.get(name) or self._reader.unread.get(name, "its weights were not read")
        return first or unchecked(unread)

    def _read_again(self, name: str, seen: "_Seen", arguments: Call) -> Verified | None:
        """Read a layer by running it as it was called and compare again; None unless that explains the call.

        One call by itself proves little: a factor that is 1, or an adapter that is 0, until it is learnt does not
        show in it. So what a run refuses stays refused, with one exception: a parameter that is added to the
        queries. Without it a run must find nothing else, and the call must be explained with it and not without.
        """
        site = self._places[name]
        ways = tuple(recorded_trials(site.module, site.config, *arguments))[:1]
        findings = [Finding(ways=ways)]
        try:
            layer_reader(site, fold_norm=False, finding=findings[0])
        except UnreadLayer as refusal:
            self._reasons[name] = str(refusal)
            layouts = [
                layout
                for layout in fitting_layouts(site.module)
                if _explains(site, Finding(layout=layout), seen) is None
            ]
            findings = [
                Finding(layout=layout, added=(added,))
                for added, parameter in site.module.named_parameters(recurse=False)
                if layouts
                and parameter.numel() % seen.operands[0].shape[-1] == 0
                and _is_all_that_is_added(site, added, ways)
                for layout in layouts
            ]
        for finding in findings:
            plan = _explains(site, finding, seen)
            if plan is not None:
                self.findings[name], self._plans[name] = finding, plan
                return _compare(plan, seen)._replace(status=Status.REREAD)
        return None


class _Seen(NamedTuple):
    """An attention call, and what entered its layer.

    Attributes:
        call: itself.
        operands: its queries and keys.
        inputs: tensors that entered the layer, and that entered or left its parts.
        has_inputs: what its projections map may be among them.
    """

    call: CapturedCall
    operands: tuple[Tensor, Tensor]
    inputs: tuple[Tensor, ...]
    has_inputs: bool


def _explains(site: AttentionLayer, finding: Finding, seen: _Seen) -> LayerReader | None:
    """How a layer is read by a finding, if that explains its call."""
    try:
        plan = layer_reader(site, fold_norm=False, finding=finding)
        return plan if _compare(plan, seen).ok else None
    except (UnreadLayer, RuntimeError):  # such as a parameter of another shape than the queries
        return None


def _compare(plan: LayerReader, seen: _Seen) -> Verified:
    if plan.is_flat:
        return unchecked("its weights are flattened by FSDP's first version")
    if plan.is_sharded():
        return unchecked("its weights are spread over processes")
    read = plan.read()
    if not all(bool(own.isfinite().all()) for own in (*seen.operands, read.query, read.key)):
        return unchecked("its queries and keys, or their weights, are not finite")
    match = compare(read, seen.inputs, *seen.operands, (_added(plan, plan.query), _added(plan, plan.key)))
    if match is None:
        return unchecked("what enters its projections was not seen")
    dtypes = [operand.dtype for operand in seen.operands] + [read.query.dtype]
    kind = seen.operands[0].device.type
    if torch.is_autocast_enabled(kind):
        dtypes.append(torch.get_autocast_dtype(kind))
    allowed = tolerance(*dtypes)
    is_self = _is_same(seen.inputs, match)
    if not match.error <= allowed:
        if not seen.has_inputs:
            return unchecked("what enters its projections was not seen")
        is_query = match.query > allowed
        side = "queries" if is_query else "keys"
        reason = f"its {side} are not W x + b as read from its weights ({plan.layout})"
        share = 0.0 if read.clip is None else beyond(read, seen.inputs, match)[0 if is_query else 1]
        if share > 0:
            reason = (
                f"a clamp to ±{read.clip:.3g} between projection and product changes {share:.2g} of the "
                f"numbers in its {side}, so that they are not W x + b"
            )
        if math.isfinite(match.error):
            reason += f": the largest difference of a head is {match.error:.2g} of its length"
        return Verified(Status.DIFFERS, match.query, match.key, reason, is_self)
    wrong = _wrong_scaling(read.scaling, seen.call, match)
    if wrong is not None:
        return Verified(Status.DIFFERS, match.query, match.key, wrong, is_self)
    return Verified(Status.VERIFIED, match.query, match.key, "", is_self)


class _Call:
    """What is kept of the newest call of one layer.

    Attributes:
        arguments: of its forward.
        inputs: tensors that entered it, and that entered or left its parts.
        has_parts: some part of it was called.
        is_done: nothing is kept any more.
    """

    def __init__(self) -> None:
        self.arguments: Call | None = None
        self.inputs: list[Tensor] = []
        self.has_parts = False
        self.is_done = False

    def clear(self, *, is_done: bool = False) -> None:
        """Free the tensors."""
        self.arguments, self.inputs = None, []
        self.is_done = self.is_done or is_done

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forget the call before, and keep what the layer gets."""
        if self._is_watching():
            self.clear()
            self.arguments = args, kwargs
            self._keep((args, kwargs))

    def enter_part(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what a part of the layer gets."""
        if self._is_watching():
            self.has_parts = True
            self._keep((args, kwargs))

    def leave_part(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep what a part of the layer gives."""
        if self._is_watching():
            self._keep(output)

    def _is_watching(self) -> bool:
        # Traced into graphs of torch.compile, as nothing.
        return not (torch.compiler.is_compiling() or self.is_done or is_recomputation())

    def _keep(self, values: Any) -> None:
        """Keep what plain tensors there are, each once; nothing is raised into the forward."""
        try:
            for tensor in _tensors(values):
                if len(self.inputs) < _MOST and not any(_same_values(tensor, own) for own in self.inputs):
                    self.inputs.append(tensor)
        except Exception:
            self.clear(is_done=True)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Tensors of numbers with two axes or more, of no class of their own."""
    if type(values) in (Tensor, nn.Parameter):
        if values.dim() >= 2 and values.is_floating_point() and values.layout is torch.strided:
            yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors share storage, offset, shape and strides."""
    if one is other:
        return True
    return (
        one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.storage_offset() == other.storage_offset()
    )


def _is_same(inputs: Sequence[Tensor], match: Match) -> bool | None:
    query, key = match.sources
    if key < 0:
        return None
    return query == key or _same_values(inputs[query], inputs[key])


def _is_all_that_is_added(site: AttentionLayer, name: str, ways: Sequence[Trial]) -> bool:
    """Whether a run of the layer finds queries and keys once this parameter is zero."""
    copy = shadow(site.module)
    parameter = copy._parameters.pop(name)
    assert parameter is not None  # it was listed
    copy.__dict__[name] = torch.zeros_like(parameter, requires_grad=False)
    try:
        find_rows(site._replace(module=copy), ways)
    except UnreadLayer:
        return False
    return True


def _decided(plan: LayerReader, is_same: bool | None) -> bool | None:
    """What a call decides on whether a layer is self-attention; None where that was known, or is not seen.

    Queries and keys that are computed from one tensor come from the same tokens. The converse holds only of layers
    that take them as arguments of their own.
    """
    takes_both = not plan.is_decided or isinstance(plan.module, nn.MultiheadAttention)
    if is_same is None or is_same is plan.self_attention:
        return None
    return is_same if takes_both or (is_same and not is_known(plan.module)) else None


def _added(plan: LayerReader, side: Side) -> Added:
    """What a layer's norm of queries or keys does besides what is folded into the weights."""
    if side.qk_norm is None:
        return Added()
    norm = side.qk_norm.read()
    offset = norm.offset if side.qk_norm.shifted else None
    gain = norm.gain if plan.gain_behind_rotation else None
    if gain is not None and side.factor is not None:
        gain = gain.reshape(-1, plan.sizes.d_head) * side.factor.values(plan.module)
    return Added(
        *(None if values is None else values.reshape(-1, plan.sizes.d_head) for values in (offset, gain))
    )


def _wrong_scaling(read: float, call: CapturedCall, match: Match) -> str | None:
    """What is wrong with the softmax scale, where the call says it; None where nothing is known to be."""
    given = call.scaling
    if match.factor is None or not isinstance(given, int | float):
        return None
    scaling = float(given) * match.factor
    if abs(scaling - read) <= _SCALING * abs(scaling):
        return None
    return f"its logits are scaled by {scaling:.4g}, which was read as {read:.4g}"


def summary(verdicts: Mapping[str, Verified], shorten: Callable[[Sequence[str]], str]) -> list[str]:
    """Sentences on a check: how many layers are verified, and of the others which and why.

    Args:
        verdicts: qualified layer name → what was found.
        shorten: makes one text of a list of names.
    """
    verified = sum(verdict.ok for verdict in verdicts.values())
    lines = [f"spectra verified on {verified} of {len(verdicts)} layers"]
    others: dict[str, list[str]] = {}
    for name, verdict in verdicts.items():
        if verdict.ok:
            continue
        what = "left out" if verdict.status is Status.DIFFERS else "not verified"
        others.setdefault(f"{what}: {verdict.reason}", []).append(name)
    for reason, names in others.items():
        verb = "is" if len(names) == 1 else f"({len(names)} layers) are"
        lines.append(f"{shorten(names)} {verb} {reason}")
    return lines
