"""Callback: probes that cost forward passes of their own, in validation."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_qk.architecture.labels import matches
from lightning_qk.callbacks._layers import Patterns, matching
from lightning_qk.callbacks._output import log_agreed
from lightning_qk.callbacks._ranks import all_or_none, alone, is_distributed, reduce_packed
from lightning_qk.callbacks._trainer import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    logging_step,
)
from lightning_qk.callbacks.monitors._base import Monitor, OnUnreadable
from lightning_qk.callbacks.monitors._keys import Families, PerLayer
from lightning_qk.callbacks.monitors._recorder import CallRecorder, models_and_doors
from lightning_qk.callbacks.monitors._round import Part
from lightning_qk.callbacks.run_directory import run_directory
from lightning_qk.heads.reader import find_attention, kept_reader
from lightning_qk.heads.sites import attention_labels
from lightning_qk.loggers.loggers import log_scalars
from lightning_qk.metrics.probes import ProbeMeans
from lightning_qk.probes.exchange import exchangeability
from lightning_qk.probes.explanation import attention_as_explanation
from lightning_qk.probes.head_report import HeadReport
from lightning_qk.probes.irrelevant import irrelevant_mass
from lightning_qk.probes.parallel_context import parallel_context_entropy
from lightning_qk.probes.run import ProbeWarning

Irrelevant = Callable[[Mapping[str, Any]], Tensor]
_Values = dict[str, dict[str, Tensor]]  # statistic → layer → (heads,)

STATISTICS = {
    "explanation": ("explanation",),
    "exchangeability": ("exchangeability",),
    "parallel_context": ("parallel_entropy_whole", "parallel_entropy_parts", "parallel_entropy_ratio"),
    "irrelevant": ("irrelevant_mass",),
}
"""Probe → the statistics that it logs."""

HEADS_NAME = "lightning_qk_heads.csv"

# Where a run of the model is a collective call: ranks whose batches differ would wait for each other.
_SHARDING = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


class ProbeOptions(TypedDict, total=False):
    """Options of :class:`~lightning_qk.callbacks.monitors.Monitor` that are not about steps."""

    per_layer: PerLayer
    per_head: bool
    families: Families
    exclude: Families
    modules: Patterns
    on_unreadable: OnUnreadable


class AttentionProbes(Monitor):
    """Asks the network questions that cost forward passes of their own, at the end of validations.

    What the outermost transformers models of the module are called with in the first batches of the first
    validation dataloader is kept, and run again by the probes: the module need not know of it. Nothing is run
    while it trains, and in the sanity check. The model, its modes and torch's global random generator stay as
    they were. A probe that fails is named once and not tried again; the others and the training go on.

    Logged keys, for each statistic of the probes asked for:

    - ``probe/<statistic>/mean`` over all heads; ``trainer.callback_metrics`` has the minimum and maximum too;
    - ``probe/layer_03/<statistic>`` with ``per_layer=True``, means over the layer's heads;
    - ``probe/layer_03/head_05/<statistic>`` with ``per_head=True``;
    - ``probe/heads/<class>`` with ``heads=True``: how many heads are of each class.

    =================== ============================ ===========================================================
    probe               statistics                   function
    =================== ============================ ===========================================================
    explanation         explanation                  :func:`~lightning_qk.probes.attention_as_explanation`
    exchangeability     exchangeability              :func:`~lightning_qk.probes.exchangeability`
    parallel_context    parallel_entropy_whole,      :func:`~lightning_qk.probes.parallel_context_entropy`
                        parallel_entropy_parts,
                        parallel_entropy_ratio
    irrelevant          irrelevant_mass              :func:`~lightning_qk.probes.irrelevant_mass`
    =================== ============================ ===========================================================

    Values are means over batches and ranks. Each validation draws the same tokens and permutations, so that
    validations can be compared. Models whose weights are sharded (FSDP, tensor parallel, DeepSpeed) are not
    probed, which is said once.

    Args:
        probes: which of the above.
        every_n_validations: probe in the first validation and every n-th after it.
        batches: how many of the first batches of a validation.
        tokens: that the explanation masks in each sequence; a forward pass each.
        mask_token_id: what they are replaced by; None: the attention mask hides them.
        permutations: of the exchangeability; a forward pass each.
        parts: of the parallel context.
        irrelevant: which tokens are noise, for the probe of that name: token ids, or a function of the model's
            keyword arguments that returns a boolean tensor (batch, tokens).
        heads: also class every head of the first model that is called (rank 0's batches), log how many are of each
            class and write the table, ``lightning_qk_heads.csv``, into the run's folder.
        seed: of the probes' own random generators.
        options: ``per_layer`` (None: no statistic), ``per_head``, ``families``, ``exclude``, ``modules`` and
            ``on_unreadable``, see :class:`~lightning_qk.callbacks.monitors.Monitor`.

    Raises:
        ValueError: an unknown probe, an argument out of range, or ``irrelevant`` without what is irrelevant; with
            ``on_unreadable="raise"``, at the start: there is nothing to probe.
    """

    group = "probe"
    statistics = tuple(name for names in STATISTICS.values() for name in names)
    curve_statistics = statistics
    witness = ""  # a head may have no value when all is well
    subject = ""

    live: ClassVar[tuple[str, ...]] = ("_recorder", "_is_probed")

    def __init__(
        self,
        probes: Sequence[str] = ("explanation", "exchangeability", "parallel_context"),
        *,
        every_n_validations: int = 1,
        batches: int = 1,
        tokens: int = 16,
        mask_token_id: int | None = None,
        permutations: int = 4,
        parts: int = 4,
        irrelevant: Sequence[int] | Irrelevant | None = None,
        heads: bool = False,
        seed: int = 0,
        **options: Unpack[ProbeOptions],
    ) -> None:
        super().__init__(None, figures_every=0, report=False, **options)
        unknown = [name for name in probes if name not in STATISTICS]
        if isinstance(probes, str) or unknown:
            raise ValueError(
                f"expected probes among {', '.join(STATISTICS)}, got {probes!r}: pass a list of names"
            )
        if ("irrelevant" in probes) != (irrelevant is not None):
            raise ValueError(
                "expected the probe 'irrelevant' and the argument irrelevant together, got one of them: pass the "
                "token ids that are noise, or a function that marks them"
            )
        counts = {
            "every_n_validations": every_n_validations,
            "batches": batches,
            "tokens": tokens - 1,
            "permutations": permutations,
            "parts": parts,
        }
        for name, value in counts.items():
            if value < 1:
                least = 2 if name == "tokens" else 1
                raise ValueError(f"expected {name} of at least {least}, got {value + least - 1}")
        self.probes = tuple(dict.fromkeys(probes))
        self.every_n_validations = every_n_validations
        self.batches = batches
        self.tokens = tokens
        self.mask_token_id = mask_token_id
        self.permutations = permutations
        self.parts = parts
        self.irrelevant = irrelevant
        self.heads = heads
        self.seed = seed

    def begin(self) -> None:
        """Nothing was probed yet."""
        super().begin()
        self.head_report: HeadReport | None = None
        self._validations = 0
        self._directory: str | None = None
        self._recorder: CallRecorder | None = None
        # Whether this validation is to be probed, the same on every process.
        self._is_probed = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that there is something to probe."""
        super().on_fit_start(trainer, pl_module)
        self._find(pl_module)

    def _find(self, pl_module: LightningModule) -> dict[nn.Module, nn.Module | None]:
        """The models to probe, those with a layer that ``modules`` asks for, and where their calls are seen."""
        doors = models_and_doors(pl_module)
        within = {id(model): name for name, model in pl_module.named_modules() if model in doors}
        layers = list(find_attention(pl_module))
        asked = matching(layers, self.modules)
        found = [name for name in layers if any(_is_in(name, prefix) for prefix in within.values())]
        outside = {name: "it is in no transformers model" for name in asked if name not in found}
        kind = type(pl_module).__name__
        if not self.choose(
            layers if doors else [],
            outside if self.modules is not None or not found else {},
            kind="attention layer",
            nothing=(
                f"no transformers model was found in {kind}, so that nothing is probed: call the functions of "
                "lightning_qk.probes with the network and its arguments"
            ),
            unread="in a transformers model",
        ):
            return {}
        return {
            model: door
            for model, door in doors.items()
            if any(_is_in(name, within[id(model)]) for name in asked)
        }

    # Nothing is measured while the module trains.

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def end_step(self, trainer: Trainer) -> bool:
        """Nothing is due."""
        return False

    # Validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand before the models' forward, in a validation that is to be probed."""
        self._recorder, self._is_probed = None, False
        if trainer.sanity_checking:
            return
        is_due = self._validations % self.every_n_validations == 0
        self._validations += 1
        if not is_due:
            return
        if isinstance(trainer.strategy, _SHARDING):
            self.note(
                f"models sharded by {type(trainer.strategy).__name__} are not probed, since all processes would "
                "have to make the same runs: probe a checkpoint with lightning_qk.probes instead"
            )
            return
        if self._directory is None:
            self._directory = run_directory(trainer)  # validation without a fit around it
        # Every process comes to the probes, whatever it could not find or hook.
        self._is_probed = True
        self.here(lambda: self._stand(pl_module))

    def _stand(self, pl_module: LightningModule) -> None:
        doors = self._find(pl_module)
        if doors:
            self._recorder = CallRecorder(doors)
            self._recorder.install()
        else:
            self._is_probed = False

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what the models are called with in the first batches."""
        if self._recorder is not None:
            self._recorder.listen(dataloader_idx == 0 and batch_idx < self.batches)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the probes, when all monitors have stopped listening."""
        recorder, self._recorder = self._recorder or CallRecorder({}), None
        if not self._is_probed:
            return
        self._is_probed = False
        self.attempt(recorder.remove, "probing")
        values = self.together(trainer, lambda: self._probe(trainer, pl_module, recorder))
        if values is not None:
            self.here(lambda: self._publish_probes(trainer, pl_module, values))
        if self.heads:
            self._class_heads(trainer, pl_module, recorder)
        recorder.clear()

    def _publish_probes(
        self, trainer: Trainer, pl_module: LightningModule, values: dict[str, Tensor]
    ) -> None:
        self.count_layers(trainer, pl_module)
        self.share(trainer, pl_module, values, in_evaluation=True)
        self.attempt(lambda: self.publish(trainer, pl_module, values), "remembering")

    def release(self) -> None:
        """Stand no more before the models' forward, whatever ended the loop."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.remove()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the heads are."""
        super().on_train_end(trainer, pl_module)
        if self.head_report is not None and trainer.is_global_zero:
            counts = ", ".join(f"{n} {kind}" for kind, n in self.head_report.counts().items() if n)
            print(f"Heads: {counts}")

    def state_dict(self) -> dict[str, Any]:
        """The history, and how many validations there were."""
        return {**super().state_dict(), "validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history of a checkpoint."""
        super().load_state_dict(state_dict)
        self._validations = int(state_dict.get("validations", 0))

    # Probing

    def part(self, trainer: Trainer, pl_module: LightningModule) -> Part:
        """Nothing: there is nothing to measure at a step."""
        return Part(self, trainer, pl_module)

    def _probe(
        self, trainer: Trainer, pl_module: LightningModule, recorder: CallRecorder
    ) -> dict[str, Tensor] | None:
        """Statistic → flat values of all heads, reduced over ranks; a collective call."""
        before = len(self.notes)
        found, heads, cross = all_or_none(trainer, lambda: self._run_all(trainer, pl_module, recorder))
        heads, cross = self._agree(trainer, heads, cross, self.notes[before:])
        order = [name for name in find_attention(pl_module) if name in heads] if heads else []
        heads = {name: heads[name] for name in order}
        if not heads:
            return None

        def pooled() -> ProbeMeans:
            own = {name: name not in cross for name in heads}
            self.remember_layers(heads, attention_labels(pl_module, own))
            statistics = [statistic for name in self.probes for statistic in STATISTICS[name]]
            metric = alone(ProbeMeans(heads, statistics)).to(pl_module.device)
            for values in found:
                for statistic, layers in values.items():
                    metric.update(statistic, layers)
            return metric

        metric = all_or_none(trainer, pooled)
        reduce_packed(trainer, [metric], [])
        # torchmetrics makes scalars of a model's only head. One copy from the device brings all statistics.
        values = metric.compute()
        table = torch.stack([value.reshape(-1) for value in values.values()]).to("cpu", torch.float32)
        return dict(zip(values, table.unbind(), strict=True))

    def _run_all(
        self, trainer: Trainer, pl_module: LightningModule, recorder: CallRecorder
    ) -> tuple[list[_Values], dict[str, int], set[str]]:
        """What the probes found here, heads of its layers, and which are cross-attention; no collective call."""
        found: list[_Values] = []
        cross: set[str] = set()
        for index, model in enumerate(recorder.models):
            prefix = next(name for name, module in pl_module.named_modules() if module is model)
            for call in recorder.calls[index]:
                for name in self.probes:
                    # Of its own kind: where a probe fails on one rank, all go on to the reduction.
                    run = partial(self._run, trainer, name, model, call)
                    values = self.attempt(run, f"the probe {name}")
                    if values:
                        found.append(_chosen(_with_prefix(values, prefix), self.modules))
            cross |= {_join(prefix, name) for name in self.attempt(partial(_cross, model), "reading") or ()}
        if recorder.models and not any(recorder.calls.values()):
            self.note(
                "no call of a transformers model was seen in the first batches of validation, so that nothing is "
                "probed: a model inside a compiled graph cannot be seen (compile it alone, by "
                "torch.compile(model)), and steps of generation do not count"
            )
        heads = {
            layer: value.numel()
            for values in found
            for each in values.values()
            for layer, value in each.items()
        }
        return found, heads, cross

    def _run(self, trainer: Trainer, name: str, model: nn.Module, call: dict[str, Any]) -> _Values:
        """One probe on one batch, in the precision of the trainer."""
        generator = torch.Generator().manual_seed(self.seed + trainer.global_rank)
        precision = trainer.precision_plugin.forward_context()
        with precision, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ProbeWarning)
            if name == "explanation":
                values = attention_as_explanation(
                    model, call, tokens=self.tokens, mask_token_id=self.mask_token_id, generator=generator
                )
                out = {"explanation": values}
            elif name == "exchangeability":
                values = exchangeability(model, call, permutations=self.permutations, generator=generator)
                out = {"exchangeability": values}
            elif name == "parallel_context":
                entropies = parallel_context_entropy(model, call, parts=self.parts)
                out = dict(zip(STATISTICS[name], entropies, strict=True))
            else:
                out = {"irrelevant_mass": irrelevant_mass(model, call, self._marks(call))}
        for each in caught:
            if issubclass(each.category, ProbeWarning):
                self.note(f"of the probe {name}, {each.message}")
            else:
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        return out

    def _marks(self, call: Mapping[str, Any]) -> Tensor:
        if callable(self.irrelevant):
            return self.irrelevant(call)
        ids = call.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ValueError(
                "expected input_ids among the model's arguments to find irrelevant tokens in, got "
                f"{sorted(call)}: pass a function that marks them"
            )
        return torch.isin(ids, torch.tensor(list(self.irrelevant or ()), dtype=ids.dtype, device=ids.device))

    def _agree(
        self, trainer: Trainer, heads: dict[str, int], cross: set[str], notes: list[str]
    ) -> tuple[dict[str, int], set[str]]:
        """The layers that any rank has values of, lest their metrics differ in shape, and what others note."""
        if not is_distributed(trainer):
            return heads, cross
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, (heads, cross, notes))
        for other_heads, other_cross, other_notes in found:
            heads = {**other_heads, **heads}
            cross = cross | other_cross
            for sentence in other_notes:
                self.note(sentence)
        return heads, cross

    def publish(self, trainer: Trainer, pl_module: LightningModule | None, values: dict[str, Tensor]) -> None:
        """Send the values to the history and the loggers."""
        step = logging_step(trainer)
        self.history.append(step, values)
        self.log_values(trainer, values, step)

    def _class_heads(self, trainer: Trainer, pl_module: LightningModule, recorder: CallRecorder) -> None:
        """Class the heads on rank zero, and let the others know how many are of each class."""
        counts: Mapping[str, int] | None = None
        if trainer.is_global_zero:
            counts = self.attempt(lambda: self._class_counts(trainer, recorder), "classing heads")
        counts = trainer.strategy.broadcast(counts)
        if counts is not None:
            scalars = {f"{self.group}/heads/{kind}": float(count) for kind, count in counts.items()}
            log_agreed(pl_module, scalars)
            if self.is_logged("heads"):
                log_scalars(trainer, scalars, logging_step(trainer))

    def _class_counts(self, trainer: Trainer, recorder: CallRecorder) -> Mapping[str, int] | None:
        report = self._report_heads(trainer, recorder)
        return None if report is None else report.counts()

    def _report_heads(self, trainer: Trainer, recorder: CallRecorder) -> HeadReport | None:
        index = next((index for index, calls in recorder.calls.items() if calls), None)
        if index is None:
            return None
        with trainer.precision_plugin.forward_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ProbeWarning)  # the table says what is left out
            self.head_report = HeadReport.from_model(recorder.models[index], recorder.calls[index])
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.head_report.to_csv(Path(self._directory or trainer.default_root_dir) / HEADS_NAME)
        return self.head_report


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _with_prefix(values: _Values, prefix: str) -> _Values:
    return {
        statistic: {_join(prefix, layer): value for layer, value in layers.items()}
        for statistic, layers in values.items()
    }


def _chosen(values: _Values, modules: Patterns) -> _Values:
    """Values of the layers that patterns match."""
    return {
        statistic: {layer: value for layer, value in layers.items() if matches(layer, modules)}
        for statistic, layers in values.items()
    }


def _is_in(name: str, prefix: str) -> bool:
    """Whether a layer is in the module of some qualified name, which is empty for the whole."""
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _cross(model: nn.Module) -> list[str]:
    """Layers of cross-attention, where the weights tell."""
    try:
        layers = kept_reader(model).layers
    except ValueError:
        return []
    return [name for name, layer in layers.items() if not layer.self_attention]
