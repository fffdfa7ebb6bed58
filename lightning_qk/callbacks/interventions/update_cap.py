"""Callback: updates of query and key weights that are held small in spectral norm."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_qk._deprecated import OldName, old_spellings
from lightning_qk.callbacks._layers import Patterns
from lightning_qk.callbacks._ranks import failed_anywhere
from lightning_qk.callbacks._trainer import projection_reader, refuse_deepspeed
from lightning_qk.callbacks.interventions._base import Intervention, When, check_when, refuse_frozen
from lightning_qk.interventions.update_cap import Capped, UpdateCapper, check_cap


class UpdateCap(Intervention):
    r"""Scales each optimizer step's update of query and key weights so that ``σ₁(ΔW) ≤ cap · σ₁(W)``.

    After Qi et al. 2025 (arXiv 2505.21910 [S]): as if the learning rate of that matrix and step had been smaller.
    See :class:`~lightning_qk.interventions.update_cap.UpdateCapper` for what is scaled and how exactly. It works
    at the optimizers' own steps, so that it comes before what other callbacks do after a step, and sees every
    step, those of manual optimization included; a step that a scaler skips does not count.

    Logged keys, at the trainer's ``log_every_n_steps``, each over the steps since the last logged one:

    - ``update_cap/factor/min`` and ``update_cap/layer_03/factor``: the smallest factor on an update, 1 for none;
    - ``update_cap/ratio/max`` and ``update_cap/layer_03/ratio``: the largest σ₁(ΔW)/σ₁(W) before the cap;
    - ``update_cap/capped``: how many query and key matrices were capped.

    With a name, ``update_cap/<name>/…``.

    Args:
        cap: largest ratio of an update. The default lets σ₁ change by a hundredth a step (ours; the source that
            was at hand gives no number).
        modules: glob pattern or patterns on qualified names of attention layers; None for all.
        iterations: of the power iteration that estimates σ₁, each step.
        when: ``"always"`` refuses layers that are frozen at the start; ``"unfrozen"`` waits, and caps a layer's
            updates once its query and key weights train.
        name: tells several of these callbacks in one trainer apart.

    Raises:
        TypeError: the trainer is not a Trainer of Lightning.
        ValueError: at the start of the fit alone: an argument is out of range, patterns match no layer, the
            weights of a layer are frozen or no plain whole parameters of its own, or DeepSpeed steps copies
            of them. A layer whose weights another callback brings into another form later, or whose update could
            not be capped on one process, is left as it is from then on, on all processes, which is said once.
    """

    group = "update_cap"
    tau = OldName("cap")

    live: ClassVar[tuple[str, ...]] = ("_ends", "_capper", "_factors", "_ratios")

    @old_spellings(tau="cap")
    def __init__(
        self,
        cap: float = 0.01,
        *,
        modules: Patterns = None,
        iterations: int = 4,
        when: When = "always",
        name: str | None = None,
    ) -> None:
        check_cap(cap, iterations)
        check_when(when)
        self.cap = float(cap)
        self.iterations = iterations
        self.when: When = when
        super().__init__(modules, name)

    def begin(self) -> None:
        """Forget the fit before."""
        super().begin()
        self._capper: UpdateCapper | None = None
        self._resumed: Mapping[str, Sequence[Tensor]] = {}
        self._ends: list[Callable[[], None]] = []
        self._labels: dict[str, str] = {}
        # Layers whose first cap was reported.
        self._reported: set[str] = set()
        # Per matrix since the last logged step.
        self._factors: dict[tuple[str, str], Tensor] = {}
        self._ratios: dict[tuple[str, str], Tensor] = {}

    def kept(self) -> dict[str, Any]:
        """The curves, the vectors that estimates go on from, and what was done since the last logged step."""
        since = {
            f"{side}:{name}": [self._factors[name, side].cpu(), self._ratios[name, side].cpu()]
            for name, side in self._factors
        }
        subspaces = self._resumed if self._capper is None else self._capper.state_dict()
        return {**super().kept(), "subspaces": subspaces, "since": since, "told": sorted(self._reported)}

    def go_on(self, kept: Mapping[str, Any]) -> None:
        """Go on with a checkpoint's run."""
        super().go_on(kept)
        self._resumed = kept["subspaces"]
        self._reported = set(kept.get("told", ()))
        for key, (factor, ratio) in kept["since"].items():
            side, _, name = key.partition(":")
            self._factors[name, side], self._ratios[name, side] = factor, ratio
        if self._capper is not None:
            self._capper.load_state_dict(self._resumed)

    def check_strategy(self, trainer: Trainer) -> None:
        """Refuse DeepSpeed."""
        refuse_deepspeed(trainer, type(self).__name__)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the matrices and follow the optimizers; raise where the weights cannot be scaled."""
        self.release()
        reader = projection_reader(trainer, pl_module)
        capper = UpdateCapper(
            reader,
            self.cap,
            modules=self.modules,
            iterations=self.iterations,
            trained=False,
        )
        refuse_frozen(capper.frozen, self.when)
        capper.spare = self._spare
        names = capper.layers  # of the whole fit, whatever becomes of one
        capper.agree = lambda doubts: failed_anywhere(trainer, names, doubts)
        capper.load_state_dict(self._resumed)
        self._capper = capper
        self._ends = [capper.follow(optimizer, self._note) for optimizer in trainer.optimizers]
        self._labels = reader.labels
        self._is_due = False

    def leave_alone(self, reasons: Mapping[str, str]) -> None:
        """Cap the updates of layers no more: qualified name → why, as a clause about the layer."""
        if self._capper is not None:
            for name, reason in reasons.items():
                self._capper.leave_alone(name, reason)

    def _spare(self, name: str, reason: str) -> None:
        sentence = f"updates of {name} are not capped any more: {reason}; training goes on"
        self.say(sentence, where=self._labels.get(name, ""))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was done since the last logged step."""
        if not self._is_due or not self.has_stepped(trainer) or not self._factors:
            return
        self._is_due = False
        keys = list(self._factors)
        # One copy from the device.
        device = pl_module.device
        table = torch.stack(
            [torch.stack([self._factors[key].to(device), self._ratios[key].to(device)]) for key in keys]
        )
        table = table.float().cpu()
        self._factors.clear()
        self._ratios.clear()
        factors, ratios = table.unbind(1)
        scalars = {
            f"{self.prefix}/factor/min": factors.min().item(),
            f"{self.prefix}/ratio/max": ratios.max().item(),
            f"{self.prefix}/capped": float((factors < 1).sum()),
        }
        layers: dict[str, float] = {}
        for name in dict.fromkeys(name for name, _ in keys if name in self._labels):
            own = [place for place, key in enumerate(keys) if key[0] == name]
            layers[f"{self.prefix}/{self._labels[name]}/factor"] = factors[own].min().item()
            layers[f"{self.prefix}/{self._labels[name]}/ratio"] = ratios[own].max().item()
            self._tell(name, factors[own].min().item(), ratios[own].max().item())
        self.log_step(trainer, pl_module, scalars, layers)

    def _tell(self, name: str, factor: float, ratio: float) -> None:
        """Remember the first cap of a layer."""
        if factor >= 1 or name in self._reported:
            return
        self._reported.add(name)
        label = self._labels[name]
        self.happened(
            "cap",
            f"UpdateCap scaled an update of {label} for the first time: it was {ratio:.3g} of the weights' size, "
            f"above {self.cap:g} (factor {factor:.3g})",
            where=label,
            value=ratio,
            threshold=self.cap,
        )

    def release(self) -> None:
        """Leave the optimizers as they were."""
        for end in self._ends:
            end()
        self._ends = []
        if self._capper is not None:
            # A checkpoint may be saved when the fit has ended.
            self._resumed, self._capper = self._capper.state_dict(), None

    def _note(self, found: dict[tuple[str, str], Capped]) -> None:
        self.log_safely(lambda: self._remember(found))

    def _remember(self, found: dict[tuple[str, str], Capped]) -> None:
        for key, capped in found.items():
            factor, ratio = self._factors.get(key), self._ratios.get(key)
            if factor is None or ratio is None:
                self._factors[key], self._ratios[key] = capped
            else:
                self._factors[key] = torch.minimum(factor.to(capped.factor.device), capped.factor)
                self._ratios[key] = torch.maximum(ratio.to(capped.ratio.device), capped.ratio)
