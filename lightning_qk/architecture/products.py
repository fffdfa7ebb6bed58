"""Products whose softmax is taken, found by following what functions of torch make of what."""

import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# What a softmax that a layer computes by hand begins with is the exponential.
_SOFTMAX = frozenset({"softmax", "_softmax", "log_softmax", "exp", "exp_"})
_MULTI_HEAD = "multi_head_attention_forward"


class Product(NamedTuple):
    """A product whose softmax is taken.

    Attributes:
        query: (..., n, d).
        key: (..., m, d).
        logits: what the softmax is taken of, or None where a fused function takes both.
        scaling: a factor that is not in the logits.
        dots: the dot products themselves, or None in a fused function.
        dim: of the logits, over which the softmax is taken.
        keys_first: the last axis of the dot products runs over the query's side.
        is_normed: a norm stands between the dot products and the logits.
    """

    query: Tensor
    key: Tensor
    logits: Tensor | None
    scaling: float
    dots: Tensor | None = None
    dim: int = -1
    keys_first: bool = False
    is_normed: bool = False


class Following(TorchFunctionMode):
    """Records inputs and outputs of every function of torch, and finds the products under softmaxes."""

    def __init__(self, passed: Sequence[Any] = ()) -> None:
        """Begin.

        Args:
            passed: calls of norms that are passed by, as they come, each with what it ``gave``.
        """
        super().__init__()
        self._passed = passed
        self.made: list[tuple[str, list[Tensor], list[Tensor], tuple[Any, ...], dict[str, Any]]] = []
        self.products: list[Product] = []
        self._exponentials: list[tuple[Tensor, slice]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        found: list[Product] = []
        if name == "scaled_dot_product_attention":
            self._attention(*args, **kwargs)
        elif name == _MULTI_HEAD:
            with self:
                self._multi_head(*args, **kwargs)
        elif name in _SOFTMAX:
            logits = args[0] if args else kwargs.get("input")
            if isinstance(logits, Tensor):
                if name.startswith("exp"):
                    logits = self._unshifted(logits)
                found = list(self._behind(logits))
                if not name.startswith("exp"):
                    found = [product._replace(dim=_dim(args, kwargs)) for product in found]
                elif found:
                    behind = slice(len(self.products), len(self.products) + len(found))
                self.products += found
        elif name in ("sum", "logsumexp") and args:
            self._normalized(args[0], _dim(args, kwargs))
        out = func(*args, **kwargs)
        if name.startswith("exp") and found:
            self._exponentials.append((out, behind))
        outputs = list(tensors_in(out))
        if outputs:
            self.made.append((name, list(tensors_in((args, kwargs))), outputs, args, kwargs))
        return out

    def _unshifted(self, logits: Tensor) -> Tensor:
        """What the largest logit, or the logarithm of their sum, was subtracted from before the exponential."""
        made = {id(out): own for own in self.made for out in own[2]}
        own = made.get(id(logits))
        if own is None or own[0] not in ("sub", "__sub__", "sub_", "subtract") or len(own[3]) < 2:
            return logits
        taken = made.get(id(own[3][1]))
        while taken is not None and taken[0] in ("detach", "__getitem__", "unsqueeze", "expand_as"):
            taken = made.get(id(taken[3][0]))
        is_shift = taken is not None and taken[0] in ("amax", "max", "logsumexp", "__get__")
        return own[3][0] if is_shift and isinstance(own[3][0], Tensor) else logits

    def _normalized(self, summed: Any, dim: int) -> None:
        """Keep what exponentials are divided by the sum over."""
        for made, places in self._exponentials:
            if made is summed:
                self.products[places] = [product._replace(dim=dim) for product in self.products[places]]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if enable_gqa and query.shape[-3] % key.shape[-3] == 0:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        scaling = query.shape[-1] ** -0.5 if scale is None else float(scale)
        self.products.append(Product(query, key, None, scaling))

    def _multi_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        *others: Any,
        use_separate_proj_weight: bool = False,
        q_proj_weight: Tensor | None = None,
        k_proj_weight: Tensor | None = None,
        **options: Any,
    ) -> None:
        """What torch's function for whole layers projects: tokens first, or without a batch."""
        if use_separate_proj_weight:
            assert q_proj_weight is not None
            assert k_proj_weight is not None
            weights = (q_proj_weight, k_proj_weight)
        else:
            assert in_proj_weight is not None
            weights = in_proj_weight.chunk(3)[:2]  # type: ignore[assignment]
        biases = (None, None) if in_proj_bias is None else in_proj_bias.chunk(3)[:2]
        sides = (
            F.linear(given, weight, bias).unflatten(-1, (num_heads, -1)).movedim(0, -2)
            for given, weight, bias in zip((query, key), weights, biases, strict=True)
        )
        own, others_own = sides
        self.products.append(Product(own, others_own, None, own.shape[-1] ** -0.5))

    def _behind(self, logits: Tensor) -> Iterator[Product]:
        """The products that a tensor was computed from by elementwise functions."""
        open_ends = [(logits, len(self.made), False)]
        seen: set[tuple[int, int]] = set()
        while open_ends:
            tensor, before, is_normed = open_ends.pop()
            is_normed = is_normed or any(tensor is own.gave for own in self._passed)
            place = next(
                (i for i in range(before - 1, -1, -1) if any(tensor is out for out in self.made[i][2])), None
            )
            if place is None or (id(tensor), place) in seen:
                continue
            seen.add((id(tensor), place))
            name, inputs, outputs, args, kwargs = self.made[place]
            pair = _operands(name, args, kwargs)
            if pair is None:
                open_ends += [(given, place, is_normed) for given in inputs]
                continue
            dots = outputs[0]
            if name == "baddbmm":
                dots = pair[0] @ pair[1].mT
            keys_first = name == "einsum" and _ends_left(args[0])
            yield Product(*pair, logits, 1.0, dots, keys_first=keys_first, is_normed=is_normed)


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", -1))
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    return dim if isinstance(dim, int) else -1


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _operands(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The two sides of a product as (..., n, d) and (..., m, d); None for another function."""
    if name in ("matmul", "__matmul__", "__rmatmul__", "bmm", "mm"):
        sides = [*args, *(kwargs[key] for key in ("input", "other", "mat2") if key in kwargs)]
        if len(sides) < 2 or not all(isinstance(side, Tensor) and side.dim() >= 2 for side in sides[:2]):
            return None
        left, right = sides[:2] if name != "__rmatmul__" else sides[1::-1]
        return left, right.mT
    if name == "baddbmm":
        sides = [*args[1:], *(kwargs[key] for key in ("batch1", "batch2") if key in kwargs)]
        return (sides[0], sides[1].mT) if len(sides) >= 2 else None
    if name == "einsum" and args and isinstance(args[0], str):
        sides = list(args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:])
        return _einsum_operands(args[0], *sides) if len(sides) == 2 else None
    return None


def _ends_left(equation: str) -> bool:
    """Whether the last axis of an einsum's output is its left side's."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    return output[-1:] in inputs.partition(",")[0]


def _einsum_operands(equation: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both sides of an einsum, several axes of one side's own (groups of heads and tokens) taken together."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    if "." in equation:
        free = iter(sorted(set(string.ascii_letters) - set(equation)))
        counts = [
            tensor.dim() - len(side.replace("...", "")) if "..." in side else 0
            for tensor, side in ((left, first), (right, second))
        ]
        labels = "".join(next(free) for _ in range(max(counts)))
        first, second = (
            side.replace("...", labels[len(labels) - count :])
            for side, count in zip((first, second), counts, strict=True)
        )
        output = output.replace("...", labels)
    contracted = [label for label in first if label in second and label not in output]
    own = [
        [label for label in side if label not in other] for side, other in ((first, second), (second, first))
    ]
    shared = [label for label in first if label in second and label in output]
    if not output or len(contracted) != 1 or not all(own):
        return None
    if any(len(set(side)) != len(side) for side in (first, second)):
        return None
    query, key = (
        tensor.permute([side.index(label) for label in (*shared, *labels, *contracted)]).flatten(
            len(shared), len(shared) + len(labels) - 1
        )
        for tensor, side, labels in ((left, first, own[0]), (right, second, own[1]))
    )
    return query, key


def softmax_factor(first: Product, second: Product) -> tuple[float | None, bool]:
    """The factor of two products' logits on the change of the products, and whether keys are on the left."""
    if first.logits is None or second.logits is None:
        return first.scaling, False
    assert first.dots is not None  # where there are logits
    assert second.dots is not None
    if first.logits.shape != second.logits.shape or first.dots.shape != second.dots.shape:
        return None, False
    change = second.dots.double() - first.dots.double()
    before, after = (own.logits.double().movedim(own.dim, -1) for own in (first, second))  # type: ignore[union-attr]
    # What is masked is some large negative number.
    kept = before.isfinite() & after.isfinite() & (before > -1e3) & (after > -1e3)
    outcome = after - before
    tolerance = 1e-3 if first.logits.dtype in (torch.float32, torch.float64) else 3e-2
    for is_left, axis in ((False, change), (True, change.mT)):
        own, own_kept = outcome, kept
        if own.shape[-1] > axis.shape[-1]:
            # Learnt sinks stand behind the logits.
            own, own_kept = own[..., : axis.shape[-1]], own_kept[..., : axis.shape[-1]]
        if own.numel() != axis.numel():
            continue
        factor = _proportion(axis.flatten()[own_kept.flatten()], own.flatten()[own_kept.flatten()], tolerance)
        if factor is not None:
            return factor, is_left != first.keys_first
    # In another order of heads and tokens, which their sums tell.
    canonical = [product.query.double() @ product.key.double().mT for product in (first, second)]
    change = canonical[1] - canonical[0]
    if not bool(kept.all()) or change.numel() != outcome.numel():
        return None, False
    for is_left, axis in ((False, change), (True, change.mT)):
        sums, wanted = (part.abs().sum(-1).flatten().sort().values for part in (axis, outcome))
        if sums.shape != wanted.shape:
            continue
        factor = _proportion(sums, wanted, tolerance)
        if factor is not None:
            ordered = axis.flatten().sort().values, outcome.flatten().sort().values
            signed = _proportion(*ordered, tolerance)
            return signed, is_left
    return None, False


def _proportion(change: Tensor, outcome: Tensor, tolerance: float) -> float | None:
    """The number other than 0 that makes one change the other; None where there is none."""
    if not change.numel() or not float(change.abs().max()) > 0:
        return None
    factor = float(change @ outcome / change.square().sum())
    left = float((outcome - factor * change).abs().max())
    return factor if factor and left <= tolerance * float(outcome.abs().max()) else None
