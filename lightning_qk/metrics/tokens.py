"""Token-aware spectra of every head of a model as a metric."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_qk.functional.rotary import Rotary
from lightning_qk.functional.spectrum import MOMENTS, Support
from lightning_qk.functional.token_moments import TokenMoments
from lightning_qk.functional.token_sums import TokenLayout, TokenSums, moments_of
from lightning_qk.metrics.spectrum import at_offset


class TokenLayer(NamedTuple):
    """What the spectra of a layer's tokens need besides their moments.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key heads.
        d_head: width of a head.
        d_model: width of what the projections read.
        scaling: the softmax scale.
        self_attention: queries and keys come from the same tokens.
        rotary: the layer's rotation, or None.
    """

    heads: int
    kv_heads: int
    d_head: int
    d_model: int
    scaling: float
    self_attention: bool = True
    rotary: Rotary | None = None


class TokenStatistics(Metric):
    """Moments of the spectrum of ``s Σ^½ W_QK Σ^½`` of every head, Σ the covariance of the layer's own tokens.

    Sums over calls add up over micro-batches, and in one reduction over ranks. Memory is
    ``8 · (3 d_head² + 190 d_head)`` bytes a head.

    Args:
        layers: layer name → :class:`TokenLayer`, in the model's order.
        support: what the spectrum is averaged over, see :func:`~lightning_qk.functional.qk_moments`.
        offsets: how many positions keys precede their query; see :class:`~lightning_qk.QKSpectrumMonitor`.

    Attributes:
        statistics: names of what :meth:`compute` returns.

    States:
        sums: all features of all heads, flat, float64, summed over ranks.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    sums: Tensor

    def __init__(
        self, layers: Mapping[str, TokenLayer], support: Support = "model", offsets: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.layers = dict(layers)
        self.support = support
        self.offsets = tuple(offsets)
        self.statistics = (
            *MOMENTS,
            *(at_offset(name, offset) for offset in self.offsets for name in MOMENTS),
        )
        self._layouts = {name: TokenLayout(own.d_head) for name, own in self.layers.items()}
        self._sizes = [self._layouts[name].size * own.heads for name, own in self.layers.items()]
        self.add_state("sums", torch.zeros(sum(self._sizes), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: Mapping[str, TokenSums]) -> None:
        """Add calls.

        Args:
            sums: layer name → what :func:`~lightning_qk.functional.token_sums.token_sums` returned.

        Raises:
            ValueError: a layer that the metric was not built for, or of another shape.
        """
        parts = self._parts()
        for name, one in sums.items():
            own = parts.get(name)
            if own is None or own.shape != (one.total.shape[0], one.total.shape[-1]):
                raise ValueError(
                    f"expected sums of one of {list(self.layers)[:3]}..., got {name!r} with "
                    f"{tuple(one.total.shape)}: build the metric from the layers that are captured"
                )
            own += one.total.sum(1).to(own)

    def _parts(self) -> dict[str, Tensor]:
        split = self.sums.split(self._sizes)
        return {
            name: part.view(-1, own.heads)
            for (name, own), part in zip(self.layers.items(), split, strict=True)
        }

    def compute(self) -> dict[str, Tensor]:
        """Statistic → values of all heads, flat; NaN where a layer has none, or too few tokens were seen."""
        moments, columns = self._moments(), []
        for name, layer in self.layers.items():
            nothing = dict.fromkeys(MOMENTS, self.sums.new_full((layer.heads,), torch.nan))
            own, n = moments[name], layer.d_model if self.support == "model" else layer.d_head
            spectra = [nothing] * (1 + len(self.offsets))
            if layer.self_attention:
                spectra[0] = own.spectrum(layer.scaling, n=n, checked=False)
                for index, offset in enumerate(self.offsets if layer.rotary is not None else ()):
                    spectra[1 + index] = own.spectrum(
                        layer.scaling, n=n, offset=-offset, rotary=layer.rotary, checked=False
                    )
            columns.append(torch.stack([one[statistic] for one in spectra for statistic in MOMENTS]))
        # Where that is decided by the host, it would wait for the device.
        values = torch.where(self.weight > 0, torch.cat(columns, 1), torch.nan)
        return dict(zip(self.statistics, values, strict=True))

    def leave_out(self, names: Iterable[str]) -> None:
        """Forget what was seen of some layers."""
        parts = self._parts()
        for name in names:
            if name in parts:
                parts[name].zero_()

    @property
    def weight(self) -> Tensor:
        """Tokens that every value is of, ``(statistics, heads)``; 0 where a layer has no value."""
        counts = [
            torch.where(part[0] >= 2, part[0], 0.0) * self.layers[name].self_attention
            for name, part in self._parts().items()
        ]
        return torch.cat(counts).expand(len(self.statistics), -1)

    def moments(self) -> dict[str, TokenMoments]:
        """The moments of every layer that was seen."""
        parts = self._parts()
        return {name: own for name, own in self._moments().items() if bool((parts[name][:2, 0] >= 2).all())}

    def _moments(self) -> dict[str, TokenMoments]:
        return {
            name: moments_of(
                part,
                self._layouts[name],
                self.layers[name].kv_heads,
                self_attention=self.layers[name].self_attention,
            )
            for name, part in self._parts().items()
        }

    def lengths(self) -> dict[str, tuple[int, int]]:
        """Mean number of a sequence's queries and keys, of every layer that was seen, rounded."""
        out = {}
        for name, part in self._parts().items():
            found: dict[str, Any] = self._layouts[name].parts(part)
            sequences = float(found["first_count"][0, 1])
            if sequences:
                total = (found["count"] + found["first_count"])[0] / sequences
                out[name] = (round(float(total[0])), round(float(total[1])))
        return out
