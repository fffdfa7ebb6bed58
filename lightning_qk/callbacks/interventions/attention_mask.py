"""Callback: a sparse attention pattern is learnt while a model trains."""

from typing import ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_qk._deprecated import old_spellings
from lightning_qk.architecture.labels import shorten
from lightning_qk.callbacks._layers import Patterns, chosen_sites
from lightning_qk.callbacks._trainer import stepped_parameters
from lightning_qk.callbacks.interventions._attention import PenaltyIntervention
from lightning_qk.heads.facts import head_count
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.heads.sites import AttentionLayer
from lightning_qk.interventions.attention_mask import GatedAttention, OffsetGates


class DifferentiableAttentionMask(PenaltyIntervention):
    """Learns for each head which offsets between query and key it needs, with gates that the optimizer trains.

    The gates' parameters are put on the LightningModule in ``setup``, as ``attention_gates``, before
    ``configure_optimizers`` is asked: they are trained, saved and restored with the others. While training,
    gates are sampled (Gumbel-sigmoid, straight through) and open ones have a price; in validation, test and
    prediction a gate is open where its logit is positive. Weight decay pulls logits to 0: give the gates a
    group of their own without it. The layers take the memory of eager attention, n × m for each head. Monitors
    measure the gated softmax, with the gates that were drawn for the call.

    After SparseBERT's structured differentiable attention mask, arXiv 2102.12871 [V, code], whose finding is that
    the diagonal is needed least; what differs here:
    :class:`~lightning_qk.interventions.attention_mask.GatedAttention`.

    Logged keys: ``attention_mask/l1``, the mask's norm before it is weighted, and ``attention_mask/open``, the
    share of visible pairs whose gate was open, means over layers. With a name, ``attention_mask/<name>/…``.

    Args:
        weight: price of the mask's L1 norm (of the mean over layers).
        max_length: offsets up to so many positions have gates of their own; None takes the configuration's
            ``max_position_embeddings``.
        temperature: of the gates' sampling.
        initial: mean of the gates' logits at the start: 0 opens half of them; 3, nearly all, is gentler on a
            pretrained model.
        modules: glob pattern or patterns on qualified names of attention layers; None for all. Cross-attention
            has no offsets and is left out, which the log says.
        name: tells several of these callbacks in one trainer apart.

    Raises:
        TypeError: the trainer is one of the package ``pytorch_lightning``.
        ValueError: an argument is out of range; patterns match no layer when ``setup`` runs (a network that
            ``configure_model`` builds is not there yet); the number of heads or positions is not known; the
            optimizers do not train the gates; another remedy replaces a layer's function, or its call does not
            pass through transformers' interface or cannot be read; DeepSpeed.
    """

    group = "attention_mask"

    logged = ("l1", "open")

    live: ClassVar[tuple[str, ...]] = ("_sites",)

    @old_spellings(("max_length",))
    def __init__(
        self,
        *,
        weight: float = 1e-4,
        max_length: int | None = None,
        temperature: float = 1.0,
        initial: float = 0.0,
        modules: Patterns = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, modules, name)
        if (max_length is not None and max_length < 1) or temperature <= 0:
            raise ValueError(
                f"expected max_length of at least 1 and a temperature above 0, got {max_length} and {temperature}"
            )
        self.max_length = max_length
        self.temperature = temperature
        self.initial = initial

    def begin(self) -> None:
        """Forget the fit before."""
        super().begin()
        self._gates: dict[str, OffsetGates] = {}
        self._sites: list[AttentionLayer] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the gates on the module, before its optimizers are configured."""
        super().setup(trainer, pl_module, stage)
        sites = chosen_sites(pl_module, self.modules)
        cross = [site.name for site in sites if site.is_cross]
        self._sites = [site for site in sites if not site.is_cross]
        if not self._sites:
            raise ValueError(
                f"expected self-attention, got cross-attention alone ({shorten(cross)}), which has no offsets: "
                "choose other modules"
            )
        capped = [
            site.name
            for site in self._sites
            if getattr(site.module, "attn_logit_softcapping", None) is not None
        ]
        if capped:
            raise ValueError(
                f"expected attention without a soft cap of its own, got {shorten(capped)}: leave such layers out "
                "with modules="
            )
        if cross:
            rank_zero_warn(
                f"DifferentiableAttentionMask: {shorten(cross)} left out: cross-attention has no offsets"
            )
        attribute = "attention_gates" if self.name is None else f"attention_gates_{self.name}"
        kept = getattr(pl_module, attribute, None)
        if kept is None:
            heads = _head_counts(pl_module)
            made = {
                site.name.replace(".", "__"): self._make(site, heads.get(site.name)) for site in self._sites
            }
            kept = nn.ModuleDict(made)
            setattr(pl_module, attribute, kept)
        self._gates = {}
        for site in self._sites:
            gates = kept[site.name.replace(".", "__")]
            assert isinstance(gates, OffsetGates)  # made by this class
            self._gates[site.name] = gates

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gate the layers; raise here, before any work, where the gates would not be trained."""
        trained = set(map(id, stepped_parameters(trainer)))
        left = [name for name, gates in self._gates.items() if id(gates.logits) not in trained]
        if left:
            raise ValueError(
                f"expected configure_optimizers to take the gates of {shorten(left)}, got none of its optimizers "
                "that trains them: add self.attention_gates.parameters()"
            )
        self._install(pl_module)

    def release(self) -> None:
        """Leave the attention interface as it was; the gates can still be exported."""
        super().release()
        self._sites = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gate the layers, where no fit is around."""
        if self._steering is None:
            self._install(pl_module)

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def export(self, n: int | None = None) -> Tensor:
        """The learnt mask.

        Args:
            n: length of the sequences; None for offsets.

        Returns:
            Boolean, True where a head may look: ``(layers, heads, n, n)``, or by offset ``i − j``, the smallest
            first, ``(layers, heads, 2 · max_length − 1)``. On the CPU.

        Raises:
            ValueError: no trainer has set the callback up, or layers differ in their heads.
        """
        masks = [gates.open().cpu() for gates in self._gates.values()]
        if not masks or len({mask.shape for mask in masks}) > 1:
            raise ValueError(
                "expected gates of one shape in every layer, got "
                f"{sorted({tuple(mask.shape) for mask in masks})}: fit first, and choose layers that are alike "
                "with modules="
            )
        if n is not None:
            masks = [
                gates.by_pair(mask, n, n) for gates, mask in zip(self._gates.values(), masks, strict=True)
            ]
        return torch.stack(masks)

    def _make(self, site: AttentionLayer, heads: int | None) -> OffsetGates:
        heads = head_count(site.module) if heads is None else heads
        length = self.max_length or getattr(site.config, "max_position_embeddings", None)
        if heads is None or not isinstance(length, int):
            raise ValueError(
                f"expected a number of heads and of positions for {site.name}, got {heads} and {length}: pass "
                "max_length=, and leave out layers whose heads are not known with modules="
            )
        device = next((parameter.device for parameter in site.module.parameters()), None)
        gates = OffsetGates(heads, length, temperature=self.temperature, initial=self.initial)
        return gates.to(device)

    def _install(self, pl_module: LightningModule) -> None:
        names = {site.module: site.name for site in self._sites}
        gated = GatedAttention(names, self._gates, self.weight, model=pl_module)
        self.install(gated, list(self._gates), f"gates by offset, price {self.weight:g},")


def _head_counts(model: nn.Module) -> dict[str, int]:
    """Numbers of query heads, of the layers whose weights can be read."""
    try:
        return {name: layer.heads for name, layer in ProjectionReader(model).layers.items()}
    except ValueError:
        return {}
