"""An affine map, and what a way to read one from a module looks like."""

from typing import NamedTuple, Protocol

from torch import Tensor, nn


class Affine(NamedTuple):
    """``x -> weight @ x + bias``.

    Attributes:
        weight: shape ``(out, in)``: a view of the live parameter where it is stored in this form.
        bias: shape ``(out,)``, or None.
    """

    weight: Tensor
    bias: Tensor | None


class AffineMap(Protocol):
    """How one projection is read: found out once, its values taken anew by every :meth:`read`.

    Attributes:
        name: of the projection in its layer.
        rows: width of its output.
        columns: width of its input.
        as_matrix: its values come from running a module as a linear map, rather than from a stored weight.
    """

    name: str
    rows: int
    columns: int

    @property
    def as_matrix(self) -> bool:
        """Whether reading runs a module."""

    @property
    def module(self) -> nn.Module:
        """The projection."""

    def read(self) -> Affine:
        """The map as it is now, whole and differentiable; collective where the weight is sharded."""

    def plain_weight(self) -> nn.Parameter | None:
        """The parameter itself, where it is stored whole and :meth:`read` gives it as it is."""

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters that the weight may depend on."""

    def is_sharded(self) -> bool:
        """Whether reading gathers."""

    def is_view(self) -> bool:
        """Whether :meth:`read` takes no memory for the weight, but gives a view of what is stored."""

    def as_rows(self, weight: Tensor) -> Tensor:
        """A tensor of the stored weight's shape, seen as (out, in)."""
