"""Old paths of modules: for this version they can still be imported, with a warning. New moves are added here."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "lightning_qk.architecture.origin": "lightning_qk.architecture.source_code",
    "lightning_qk.callbacks.attention": "lightning_qk.callbacks.monitors.attention",
    "lightning_qk.callbacks.attention_mask": "lightning_qk.callbacks.interventions.attention_mask",
    "lightning_qk.callbacks.attention_prior": "lightning_qk.callbacks.interventions.attention_prior",
    "lightning_qk.callbacks.entropy_band": "lightning_qk.callbacks.interventions.entropy_band",
    "lightning_qk.callbacks.hard_attention": "lightning_qk.callbacks.interventions.hard_attention",
    "lightning_qk.callbacks.hidden": "lightning_qk.callbacks.monitors.hidden",
    "lightning_qk.callbacks.locater": "lightning_qk.callbacks.interventions.locater",
    "lightning_qk.callbacks.position": "lightning_qk.callbacks.monitors.position",
    "lightning_qk.callbacks.probes": "lightning_qk.callbacks.monitors.probes",
    "lightning_qk.callbacks.qk_clip": "lightning_qk.callbacks.interventions.qk_clip",
    "lightning_qk.callbacks.sigma_reparam": "lightning_qk.callbacks.interventions.sigma_reparam",
    "lightning_qk.callbacks.sinks": "lightning_qk.callbacks.monitors.sinks",
    "lightning_qk.callbacks.soft_cap": "lightning_qk.callbacks.interventions.soft_cap",
    "lightning_qk.callbacks.spectrum": "lightning_qk.callbacks.monitors.spectrum",
    "lightning_qk.callbacks.spectrum_scaling": "lightning_qk.callbacks.interventions.spectrum_scaling",
    "lightning_qk.callbacks.update_cap": "lightning_qk.callbacks.interventions.update_cap",
    "lightning_qk.capture.callers": "lightning_qk.architecture.source_code",
    "lightning_qk.capture.compiled": "lightning_qk.capture.hooks.compiled",
    "lightning_qk.capture.copies": "lightning_qk.capture.hooks.modules",
    "lightning_qk.capture.direct": "lightning_qk.capture.hooks.sdpa",
    "lightning_qk.capture.fronts": "lightning_qk.capture.registry",
    "lightning_qk.capture.generation": "lightning_qk.capture.hooks.generate",
    "lightning_qk.capture.interface": "lightning_qk.capture.capture",
    "lightning_qk.capture.listeners": "lightning_qk.capture.registry",
    "lightning_qk.capture.multihead": "lightning_qk.capture.hooks.multihead",
    "lightning_qk.capture.patches": "lightning_qk.capture.hooks.patch",
    "lightning_qk.capture.readings": "lightning_qk.capture.conventions",
    "lightning_qk.capture.record": "lightning_qk.capture.call",
    "lightning_qk.capture.softmax": "lightning_qk.capture.hooks.softmax",
    "lightning_qk.capture.steering": "lightning_qk.capture.intercept",
    "lightning_qk.capture.traces": "lightning_qk.capture.hooks.traces",
    "lightning_qk.data.labels": "lightning_qk.data.sources",
    "lightning_qk.data.packing": "lightning_qk.data.collate",
    "lightning_qk.functional.circle_law": "lightning_qk.functional.spectrum",
    "lightning_qk.functional.divergence": "lightning_qk.functional.entropy",
    "lightning_qk.functional.extremes": "lightning_qk.functional.max_logits",
    "lightning_qk.functional.localization": "lightning_qk.functional.attention",
    "lightning_qk.functional.marked": "lightning_qk.functional.attention",
    "lightning_qk.functional.power": "lightning_qk.functional.singular",
    "lightning_qk.functional.profile": "lightning_qk.functional.propagation",
    "lightning_qk.functional.regimes": "lightning_qk.record.verdicts",
    "lightning_qk.functional.retrieval": "lightning_qk.functional.hard_attention",
    "lightning_qk.functional.sums": "lightning_qk.functional.attention",
    "lightning_qk.guard.running": "lightning_qk.guard.reading",
    "lightning_qk.heads.adapted": "lightning_qk.heads.projection",
    "lightning_qk.heads.affine": "lightning_qk.heads.projection",
    "lightning_qk.heads.batch": "lightning_qk.heads.reader",
    "lightning_qk.heads.between": "lightning_qk.heads.facts",
    "lightning_qk.heads.blocks": "lightning_qk.heads.sites",
    "lightning_qk.heads.borrowing": "lightning_qk.heads.sites",
    "lightning_qk.heads.classes": "lightning_qk.architecture.source_code",
    "lightning_qk.heads.composed": "lightning_qk.heads.projection",
    "lightning_qk.heads.composition": "lightning_qk.heads.projection",
    "lightning_qk.heads.constants": "lightning_qk.heads.layer",
    "lightning_qk.heads.dry_run": "lightning_qk.heads.trials",
    "lightning_qk.heads.edit": "lightning_qk.interventions.head_scaler",
    "lightning_qk.heads.effective": "lightning_qk.heads.module_projection",
    "lightning_qk.heads.elements": "lightning_qk.heads.running",
    "lightning_qk.heads.errors": "lightning_qk.heads.projections",
    "lightning_qk.heads.factors": "lightning_qk.heads.norms",
    "lightning_qk.heads.find": "lightning_qk.heads.sites",
    "lightning_qk.heads.findings": "lightning_qk.heads.facts",
    "lightning_qk.heads.folding": "lightning_qk.heads.norms",
    "lightning_qk.heads.linear": "lightning_qk.heads.module_projection",
    "lightning_qk.heads.local": "lightning_qk.heads.sites",
    "lightning_qk.heads.module_as_matrix": "lightning_qk.heads.module_projection",
    "lightning_qk.heads.origin": "lightning_qk.architecture.source_code",
    "lightning_qk.heads.plan": "lightning_qk.heads.layer",
    "lightning_qk.heads.probing": "lightning_qk.architecture.dry_run",
    "lightning_qk.heads.products": "lightning_qk.architecture.products",
    "lightning_qk.heads.qk_norm": "lightning_qk.heads.norms",
    "lightning_qk.heads.rotary_angles": "lightning_qk.heads.rotary",
    "lightning_qk.heads.rotary_fit": "lightning_qk.heads.position",
    "lightning_qk.heads.rotary_layer": "lightning_qk.heads.rotary",
    "lightning_qk.heads.search": "lightning_qk.heads.inferred_layout",
    "lightning_qk.heads.sizes": "lightning_qk.heads.facts",
    "lightning_qk.heads.sources": "lightning_qk.heads.layouts",
    "lightning_qk.heads.stored": "lightning_qk.heads.live_weights",
    "lightning_qk.inspect.conditions": "lightning_qk.inspect.export",
    "lightning_qk.inspect.errors": "lightning_qk.inspect.documents",
    "lightning_qk.inspect.patterns": "lightning_qk.inspect.documents",
    "lightning_qk.interventions.attention_prior": "lightning_qk.interventions.penalties",
    "lightning_qk.interventions.auxiliary": "lightning_qk.interventions.penalties",
    "lightning_qk.interventions.entropy_band": "lightning_qk.interventions.penalties",
    "lightning_qk.interventions.hard_attention": "lightning_qk.interventions.replaced_attention",
    "lightning_qk.interventions.replaced": "lightning_qk.interventions.replaced_attention",
    "lightning_qk.interventions.soft_cap": "lightning_qk.interventions.replaced_attention",
    "lightning_qk.interventions.telling": "lightning_qk.interventions.layers",
    "lightning_qk.logging.figures": "lightning_qk.report.figures",
    "lightning_qk.logging.forgotten": "lightning_qk.record.forgotten",
    "lightning_qk.logging.heads": "lightning_qk.record.verdicts",
    "lightning_qk.logging.health": "lightning_qk.record.health",
    "lightning_qk.logging.history": "lightning_qk.record.history",
    "lightning_qk.logging.layers": "lightning_qk.architecture.labels",
    "lightning_qk.logging.loggers": "lightning_qk.loggers.loggers",
    "lightning_qk.logging.packing": "lightning_qk.report.packing",
    "lightning_qk.logging.parquet": "lightning_qk.record.parquet",
    "lightning_qk.logging.payload": "lightning_qk.report.payload",
    "lightning_qk.logging.pictures": "lightning_qk.loggers.pictures",
    "lightning_qk.logging.record_file": "lightning_qk.record.record_file",
    "lightning_qk.logging.report": "lightning_qk.report.report",
    "lightning_qk.logging.report_sections": "lightning_qk.report.sections",
    "lightning_qk.logging.report_texts": "lightning_qk.report.sections",
    "lightning_qk.logging.snapshots": "lightning_qk.record.snapshots",
    "lightning_qk.logging.states": "lightning_qk.record.states",
    "lightning_qk.logging.statistics": "lightning_qk.record.statistics",
    "lightning_qk.logging.whole_file": "lightning_qk.record.atomic_write",
    "lightning_qk.logging.workspace": "lightning_qk.loggers.workspace",
    "lightning_qk.logging.workspace_command": "lightning_qk.cli.workspace",
    "lightning_qk.module.perplexity": "lightning_qk.module.transformer",
    "lightning_qk.module.sharding": "lightning_qk.module.network",
}
_PACKAGES = {"lightning_qk.logging"}
"""Old packages that are gone."""


class _Moved(MetaPathFinder, Loader):
    """Imports the module at its new path in place of the old one."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        """Find an old path."""
        if fullname in MOVED:
            return ModuleSpec(fullname, self)
        return ModuleSpec(fullname, self, is_package=True) if fullname in _PACKAGES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The module at the new path; a package that is gone is made empty."""
        new = MOVED.get(spec.name)
        if new is None:
            return None
        warnings.warn(f"{spec.name} is {new} now", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        # The import system takes the module for one of the old path.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run."""
        if module.__spec__ is not None and module.__spec__.loader_state is not None:
            module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Let old paths be found."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
