"""What callbacks that replace attention functions have in common."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_qk.callbacks.interventions._steering import Patterns, Remedy, chosen_sites
from lightning_qk.capture.intercept import AttentionInterceptor
from lightning_qk.heads.sites import AttentionLayer


class ReplacingRemedy(Remedy):
    """Base of the callbacks that are at work in training, validation, test and prediction alike."""

    def __init__(self, modules: Patterns, name: str | None) -> None:
        super().__init__(modules, name)

    @abstractmethod
    def make(self, sites: Sequence[AttentionLayer], pl_module: LightningModule) -> tuple[AttentionInterceptor, str]:
        """What steers the layers, and what it does in words."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers; raise here, before any work, where one cannot be steered."""
        if self._steering is None:
            sites = chosen_sites(pl_module, self.modules)
            steering, what = self.make(sites, pl_module)
            self.steer(steering, [site.name for site in sites], what)

    on_validation_start = on_fit_start
    on_test_start = on_fit_start
    on_predict_start = on_fit_start


def layer_names(sites: Sequence[AttentionLayer]) -> dict[Any, str]:
    """Module to name."""
    return {site.module: site.name for site in sites}


def cross_names(sites: Sequence[AttentionLayer]) -> frozenset[str]:
    """Names of the layers of cross-attention."""
    return frozenset(site.name for site in sites if site.is_cross)
