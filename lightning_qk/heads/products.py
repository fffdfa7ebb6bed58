"""Products whose softmax is taken, found by following what functions of torch make of what."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Product(NamedTuple):
    """A product whose softmax is taken: (..., n, d), (..., m, d), the logits, and a factor that is not in them."""

    query: Tensor
    key: Tensor
    logits: Tensor | None
    scaling: float


class Following(TorchFunctionMode):
    """Keeps what every function of torch made of what, and finds the products that softmaxes are taken of."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, list[Tensor], list[Tensor], tuple[Any, ...]]] = []
        self.products: list[Product] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            self._attention(*args, **kwargs)
        elif name in ("softmax", "_softmax"):
            logits = args[0] if args else kwargs.get("input")
            if isinstance(logits, Tensor):
                self.products += self._behind(logits)
        out = func(*args, **kwargs)
        outputs = list(_tensors(out))
        if outputs:
            self.made.append((name, list(_tensors((args, kwargs))), outputs, args))
        return out

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

    def _behind(self, logits: Tensor) -> Iterator[Product]:
        """The products that a tensor was made of by functions of single numbers."""
        open_ends = [(logits, len(self.made))]
        seen: set[tuple[int, int]] = set()
        while open_ends:
            tensor, before = open_ends.pop()
            place = next(
                (i for i in range(before - 1, -1, -1) if any(tensor is out for out in self.made[i][2])), None
            )
            if place is None or (id(tensor), place) in seen:
                continue
            seen.add((id(tensor), place))
            name, inputs, _, args = self.made[place]
            pair = _operands(name, args)
            if pair is None:
                open_ends += [(given, place) for given in inputs]
            else:
                yield Product(*pair, logits, 1.0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _operands(name: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """The two sides of a product as (..., n, d) and (..., m, d); None for another function."""
    if name in ("matmul", "__matmul__", "bmm") and len(args) > 1:
        return args[0], args[1].mT
    if name == "baddbmm" and len(args) > 2:
        return args[1], args[2].mT
    if name == "einsum" and isinstance(args[0], str):
        sides = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
        return _einsum_operands(args[0], *sides) if len(sides) == 2 else None
    return None


def _einsum_operands(equation: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:
    inputs, _, output = equation.replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    contracted = [label for label in first if label in second and label not in output]
    own = [
        [label for label in side if label not in other] for side, other in ((first, second), (second, first))
    ]
    shared = [label for label in first if label in second and label in output]
    if not output or "." in equation or len(contracted) != 1 or any(len(labels) != 1 for labels in own):
        return None
    query, key = (
        tensor.permute([side.index(label) for label in (*shared, *labels, *contracted)])
        for tensor, side, labels in ((left, first, own[0]), (right, second, own[1]))
    )
    return query, key
