"""Find the rows that reach q and k without names: run the layer and follow numbers.

The layer's own forward is run on a copy in which every projection gives numbers of our choice in the place of its
output, one for each of its rows. At the product whose softmax is taken these numbers tell which row of which
projection each feature of q and k is, for all ways to split, order and repeat them. Norms are passed by, rotations
are given the angle zero.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.heads.affine import AffineMap
from lightning_qk.heads.composed import Composed, Part
from lightning_qk.heads.errors import InaccessibleWeights, UnreadLayer
from lightning_qk.heads.linear import affine_plan
from lightning_qk.heads.norms import is_norm, plan_norm
from lightning_qk.heads.probing import own_random_numbers, shadow
from lightning_qk.heads.products import Following, Product
from lightning_qk.heads.trials import Trial, trials

# Rows are numbered by digits to this base, small enough that half precision keeps them apart.
_BASE = 32


class FoundSide(NamedTuple):
    """Where the queries or the keys of a layer come from.

    Attributes:
        affine: the projection.
        rows: which of its rows they are, shape ``(heads, d_head)``.
        norm: a norm that they pass by on their way to the product, or None.
        given: name of the argument that the projection maps.
        normed: the projection is put together of several, with a norm between them.
        shared: how many coordinates, the last ones of each head, all heads have in common.
    """

    affine: AffineMap
    rows: Tensor
    norm: nn.Module | None
    given: str
    normed: bool = False
    shared: int = 0


class Found(NamedTuple):
    """What a run tells of an attention layer.

    Attributes:
        query: side of the queries.
        key: side of the keys, each once: ``(kv_heads, d_head)``.
        scaling: the factor on ``q · k`` as the projections give them, or None where a norm stands between.
        complete: the layer ran to its end.
    """

    query: FoundSide
    key: FoundSide
    scaling: float | None
    complete: bool


def find_rows(module: nn.Module, config: Any = None) -> Found:
    """Find the rows of a layer's projections that reach q and k, by running it alone.

    Nothing of the model is changed, no hook is called and the global generators are left as they were.

    Args:
        module: the attention layer.
        config: the nearest configuration, or None.

    Raises:
        UnreadLayer: it cannot be run alone, reaches no softmax of a product, or its q and k are not rows of
            projections of its input.
        InaccessibleWeights: the values of its weights are out of this process's reach.
    """
    parts = _Parts(module)
    kind = type(module).__name__
    if not parts.emitters:
        raise UnreadLayer(f"{kind} has no projections that are affine in their input")
    device = next(iter(parts.emitters.values())).device()
    widths = list(dict.fromkeys(emitter.plan.columns for emitter in parts.emitters.values()))[:3]
    # The first of each kind tells most: the likeliest way to call it.
    reasons: list[str] = []
    failures: list[str] = []
    with torch.no_grad(), own_random_numbers(device):
        for trial in trials(module, config, widths, device):
            try:
                return _read(module, parts, trial)
            except _NoProduct as failure:  # noqa: PERF203
                failures.append(str(failure))
            except UnreadLayer as reason:
                reasons.append(str(reason))
    if reasons:
        raise UnreadLayer(reasons[0])
    raise UnreadLayer(
        f"{kind} reaches no softmax of a product when it is run alone{failures[0] if failures else ''}"
    )


def rows_at(places: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """What takes the rows at places (heads, d_head) from a tensor (out, ...): a view where they are regular."""
    heads, d_head = places.shape
    start = int(places[0, 0])
    step = int(places[1, 0]) - start if heads > 1 else d_head
    regular = start + step * torch.arange(heads)[:, None] + torch.arange(d_head)
    is_view = step >= d_head and torch.equal(places, regular)

    def take(rows: Tensor, sizes: Any) -> Tensor:
        if is_view:
            return rows[start : start + (heads - 1) * step + d_head].unfold(0, d_head, step).movedim(-1, 1)
        return rows[places.to(rows.device)]

    return take


class _NoProduct(Exception):
    """A run did not come to a softmax."""


class _Emitter(nn.Module):
    """Stands for a projection: gives what it is told to, and keeps what it is given."""

    def __init__(self, plan: AffineMap, first: int) -> None:
        super().__init__()
        self.plan = plan
        self.first = first
        self.values = torch.zeros(plan.rows)
        self.is_random = False
        self.given: list[Tensor] = []
        self.channels_first = any(isinstance(layer, nn.Conv1d | nn.Conv2d) for layer in plan.module.modules())

    def device(self) -> torch.device:
        """Where the projection's weights are."""
        return next((tensor.device for tensor in self.plan.module.parameters()), torch.device("cpu"))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Numbers of our choice in the shape of the projection's output."""
        if self.channels_first:
            x = x.movedim(1, -1)
        if x.shape[-1] != self.plan.columns:
            raise ValueError("a projection is given something of another width")
        self.given.append(x)
        shape = (*x.shape[:-1], self.plan.rows)
        # Small, where a bound on the logits is flat.
        out = 0.1 * torch.randn(shape).to(x) if self.is_random else self.values.to(x).expand(shape).clone()
        return out.movedim(-1, 1).contiguous() if self.channels_first else out


class _Passed(nn.Module):
    """Stands for a norm: gives its input back, and keeps it beside the norm."""

    def __init__(self, norm: nn.Module, normed: list[tuple[nn.Module, Tensor]]) -> None:
        super().__init__()
        self._keep = lambda x: normed.append((norm, x))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the input."""
        self._keep(x)
        return x.clone()


class _Parts:
    """The modules in a layer, and what stands for them.

    Attributes:
        emitters: projections.
        stand_ins: what stands for projections and norms.
        normed: what norms were given in the newest run.
        size: number of rows of all projections.
    """

    def __init__(self, module: nn.Module) -> None:
        self.emitters: dict[nn.Module, _Emitter] = {}
        self.stand_ins: dict[nn.Module, nn.Module] = {}
        self.normed: list[tuple[nn.Module, Tensor]] = []
        self.size = 0
        for name, child in module.named_children():
            self._add(child, name)

    def _add(self, module: nn.Module, path: str) -> None:
        if module in self.stand_ins:
            return
        if is_norm(module):
            self.stand_ins[module] = _Passed(module, self.normed)
            return
        plan = _affine(module, path) if any(True for _ in module.parameters()) else None
        if plan is not None:
            self.emitters[module] = self.stand_ins[module] = _Emitter(plan, self.size)
            self.size += plan.rows
            return
        for name, child in module.named_children():
            self._add(child, f"{path}.{name}")


def _affine(module: nn.Module, path: str) -> AffineMap | None:
    try:
        return affine_plan(module, path)
    except InaccessibleWeights:
        raise
    except UnreadLayer:
        return None


class _Seen(NamedTuple):
    """What one run shows.

    Attributes:
        products: those that the layer takes softmaxes of.
        normed: what its norms are given, in order.
        sources: what each projection is given, the last time.
        failed: how the run ended, where by an error.
    """

    products: list[Product]
    normed: list[tuple[nn.Module, Tensor]]
    sources: dict[_Emitter, Tensor]
    failed: str


def _run(module: nn.Module, parts: _Parts, trial: Trial) -> _Seen:
    """Run the layer on a copy, its projections giving what they are told to."""
    for emitter in parts.emitters.values():
        emitter.given.clear()
    parts.normed.clear()
    copied = shadow(module, convert=_own_buffer, stand_ins=parts.stand_ins)
    if trial.config is not None and "config" in copied.__dict__:
        copied.__dict__["config"] = trial.config
    follow = Following()
    failed = ""
    try:
        with follow:
            copied(**trial.given, **trial.arguments)
    except Exception as error:
        # What comes behind the softmax may fail.
        failed = (
            f" ({type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else 'no message'})"
        )
    sources = {emitter: emitter.given[-1] for emitter in parts.emitters.values() if emitter.given}
    return _Seen(follow.products, list(parts.normed), sources, failed)


def _own_buffer(tensor: Tensor) -> Tensor:
    """A forward may write into its buffers; parameters, and large tables, are left where they are."""
    return tensor if isinstance(tensor, nn.Parameter) or tensor.numel() > 2**20 else tensor.clone()


def _read(module: nn.Module, parts: _Parts, trial: Trial) -> Found:
    """Follow the numbers of rows through one way to call the layer."""
    emitters = list(parts.emitters.values())
    numbers = torch.arange(parts.size)
    told = [torch.zeros(parts.size), torch.ones(parts.size)]
    told += [(numbers // _BASE**place % _BASE).float() for place in range(_digits(parts.size))]
    runs: list[_Seen] = []
    for values in told:
        for emitter in emitters:
            emitter.values = values[emitter.first : emitter.first + emitter.plan.rows]
        runs.append(_run(module, parts, trial))
        if not runs[-1].products or len(runs[-1].products) != len(runs[0].products):
            raise _NoProduct(runs[-1].failed)
    reason: UnreadLayer | None = None
    for place in range(len(runs[0].products)):
        try:
            query, key = (
                _numbers([getattr(run.products[place], side) for run in runs], f"its {what}")
                for side, what in (("query", "queries"), ("key", "keys"))
            )
            rows_of_query, rows_of_key = _heads(query.rows, key.rows)
            from_query = _side(rows_of_query, parts, trial, "queries", runs)
            from_key = _side(rows_of_key, parts, trial, "keys", runs)
        except UnreadLayer as error:
            # The first product says most: later ones are with positions, or in layers behind.
            reason = reason or error
            continue
        scaling = None
        if from_query.norm is None and from_key.norm is None:
            scaling = _scaling(module, parts, trial, place)
        if scaling is not None:
            scaling *= query.factor * key.factor
        return Found(from_query, from_key, scaling, not any(run.failed for run in runs))
    assert reason is not None  # there is at least one product
    raise reason


class _Numbers(NamedTuple):
    """Which row each feature is, (..., tokens, d_head), and the factor on it."""

    rows: Tensor
    factor: float


def _numbers(seen: list[Tensor], what: str) -> _Numbers:
    """Read the numbers of rows from what the layer made of zeros, of ones, and of their digits."""
    if any(tensor.shape != seen[0].shape for tensor in seen):
        raise UnreadLayer(f"{what} change their shape from run to run")
    zero, one, *digits = (tensor.double() for tensor in seen)
    factor = one - zero
    scale = float(factor.abs().max()) if factor.numel() else 0.0
    tolerance = 1e-4 if seen[0].dtype in (torch.float32, torch.float64) else 2e-2
    if not (scale > 0 and float((factor - factor.flatten()[0]).abs().max()) <= tolerance * scale):
        raise UnreadLayer(f"{what} are not rows of its projections alone, each with one factor")
    if not float(zero.abs().max()) <= tolerance * scale:
        raise UnreadLayer(f"{what} have something added to them behind the projections")
    rows = torch.zeros(seen[0].shape, dtype=torch.long, device=seen[0].device)
    for place, digit in enumerate(digits):
        value = digit / factor
        rounded = value.round()
        whole = float((value - rounded).abs().max()) <= 0.25
        if not (whole and float(rounded.min()) >= 0 and float(rounded.max()) < _BASE):
            raise UnreadLayer(f"{what} mix rows of its projections")
        rows += rounded.long() * _BASE**place
    return _Numbers(rows, float(factor.flatten()[0]))


def _digits(size: int) -> int:
    """How many digits the numbers below a size have."""
    count = 1
    while _BASE**count < size:
        count += 1
    return count


def _heads(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of every head, (heads, d_head), and of every key head, (kv_heads, d_head).

    Heads are told by the rows that they are made of, wherever they stand among batch and tokens.
    """
    try:
        batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    except RuntimeError:
        raise UnreadLayer("its queries and keys do not have as many heads as each other") from None
    query = query.expand(*batch, *query.shape[-2:]).reshape(-1, *query.shape[-2:]).cpu()
    key = key.expand(*batch, *key.shape[-2:]).reshape(-1, *key.shape[-2:]).cpu()
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for queries, keys in zip(query, key, strict=True):
        own = {tuple(row) for row in keys.tolist()}
        for row in queries.tolist():
            found.setdefault(tuple(row), set()).update(own)
    if any(len(keys) != 1 for keys in found.values()):
        raise UnreadLayer("its heads multiply with several sets of keys each")
    of_head = [next(iter(keys)) for keys in found.values()]
    distinct = list(dict.fromkeys(of_head))
    group = len(of_head) // len(distinct)
    if [row for row in distinct for _ in range(group)] != of_head:
        raise UnreadLayer("its heads that share a key do not follow each other")
    return torch.tensor(list(found)), torch.tensor(distinct)


def _side(numbers: Tensor, parts: _Parts, trial: Trial, what: str, runs: list[_Seen]) -> FoundSide:
    norm = _norm_of(numbers, runs)
    given: set[str] = set()
    first, *others = _owners(numbers, parts)
    direct = None if others else _source(first, trial)
    if direct is not None:
        return FoundSide(first.plan, numbers - first.first, norm, direct, normed=False)
    composed = _compose(numbers.flatten(), parts, trial, runs, given, depth=3)
    if len(given) != 1:
        raise UnreadLayer(f"its {what} are made of several inputs ({', '.join(sorted(given)) or 'none'})")
    rows = torch.arange(numbers.numel()).view(numbers.shape)
    common = (numbers == numbers[0]).all(0).flip(0).int().cumprod(0).sum() if len(numbers) > 1 else 0
    return FoundSide(composed, rows, norm, given.pop(), composed.normed, int(common))


def _owners(numbers: Tensor, parts: _Parts) -> list[_Emitter]:
    """The projections that rows belong to."""
    return [
        emitter
        for emitter in parts.emitters.values()
        if bool(((numbers >= emitter.first) & (numbers < emitter.first + emitter.plan.rows)).any())
    ]


def _compose(
    numbers: Tensor, parts: _Parts, trial: Trial, runs: list[_Seen], given: set[str], depth: int
) -> Composed:
    """What gives some rows, back to the layer's inputs, whose names are added to ``given``."""
    made: list[Part] = []
    for emitter in _owners(numbers, parts):
        places = ((numbers >= emitter.first) & (numbers < emitter.first + emitter.plan.rows)).nonzero()[:, 0]
        rows = numbers[places] - emitter.first
        name = _source(emitter, trial)
        if name is not None:
            given.add(name)
            made.append(Part(places, emitter.plan, rows))
            continue
        features = _features(emitter, runs)
        if features is None or depth == 0:
            raise UnreadLayer(
                f"its projection {emitter.plan.name!r} maps something else than the layer's input"
            )
        source = _compose(features.rows, parts, trial, runs, given, depth - 1)
        between = _norm_of(features.rows, runs)
        norm = None if between is None else plan_norm(between, (emitter.plan.columns,))
        if between is not None and norm is None:
            raise UnreadLayer(
                f"the norm before its projection {emitter.plan.name!r} is a {type(between).__name__}, which is no "
                "RMSNorm or LayerNorm"
            )
        made.append(Part(places, emitter.plan, rows, source, norm, features.factor))
    return Composed(made)


def _features(emitter: _Emitter, runs: list[_Seen]) -> _Numbers | None:
    """The rows that a projection's input is made of, (columns,); None where it is made otherwise."""
    if any(emitter not in run.sources for run in runs):
        return None
    try:
        numbers = _numbers([run.sources[emitter] for run in runs], "its features")
    except UnreadLayer:
        return None
    rows = numbers.rows.reshape(-1, numbers.rows.shape[-1]).cpu()
    return _Numbers(rows[0], numbers.factor) if bool((rows == rows[0]).all()) else None


def _source(emitter: _Emitter, trial: Trial) -> str | None:
    """The argument whose tokens a projection maps, as they are."""
    tokens = emitter.given[-1].flatten(0, -2)
    for name, given in trial.given.items():
        for known in (given, given.movedim(1, -1)):
            if known.shape[-1] != tokens.shape[-1]:
                continue
            known = known.flatten(0, -2)
            if bool((tokens[:, None] == known[None]).all(-1).any(1).all()):
                return name
    return None


def _norm_of(numbers: Tensor, runs: list[_Seen]) -> nn.Module | None:
    """The norm that is given the rows of one side."""
    wanted = set(numbers.flatten().tolist())
    for call, (norm, _) in enumerate(runs[0].normed):
        if any(len(run.normed) <= call or run.normed[call][0] is not norm for run in runs):
            continue
        with suppress(UnreadLayer):
            rows = _numbers([run.normed[call][1] for run in runs], "its features").rows
            if wanted & set(rows.flatten().tolist()):
                return norm
    return None


def _scaling(module: nn.Module, parts: _Parts, trial: Trial, place: int) -> float | None:
    """The factor between a product and what its softmax is taken of, from how that changes with the product.

    What is added, such as masks and biases of position, does not change; a bound on the logits is flat where
    they are small. None where the two are not proportional.
    """
    for emitter in parts.emitters.values():
        emitter.is_random = True
    try:
        seen = [_run(module, parts, trial).products for _ in range(2)]
    finally:
        for emitter in parts.emitters.values():
            emitter.is_random = False
    if any(len(products) <= place for products in seen):
        return None
    first, second = (products[place] for products in seen)
    if first.logits is None or second.logits is None:
        return first.scaling
    try:
        before, after = (part.query.double() @ part.key.double().mT for part in (first, second))
    except RuntimeError:
        return None
    logits, later = first.logits.double(), second.logits.double()
    if logits.shape[-1] > before.shape[-1]:
        # Learnt sinks stand behind the logits.
        logits, later = logits[..., : before.shape[-1]], later[..., : before.shape[-1]]
    if logits.numel() != before.numel() or later.numel() != after.numel():
        return None
    # What is masked is some large negative number.
    kept = (logits.isfinite() & later.isfinite() & (logits > -1e3) & (later > -1e3)).flatten()
    change, outcome = (after - before).flatten()[kept], (later - logits).flatten()[kept]
    if not change.numel() or not float(change.abs().max()) > 0:
        return None
    factor = float(change @ outcome / change.square().sum())
    tolerance = 1e-3 if first.logits.dtype in (torch.float32, torch.float64) else 3e-2
    left = float((outcome - factor * change).abs().max())
    return factor if left <= tolerance * float(outcome.abs().max()) else None
