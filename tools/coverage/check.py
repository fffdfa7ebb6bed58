"""Build, run, read and capture one model type, and compare both with what its forward did."""

import logging
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_qk.heads.projections import HeadProjections
from lightning_qk.heads.reader import ProjectionReader, find_attention, unread
from lightning_qk.verification.inputs import first_that_runs
from lightning_qk.verification.statistics import CapturedCalls, layer_of, verify_statistics
from lightning_qk.verification.trace import Event, Trace
from tools.coverage import catalogue
from tools.coverage.feed import feeds
from tools.coverage.toy import LADDER, Recipe, build, shrunk
from tools.coverage.weights import verify_weights

IMPLEMENTATIONS = ("eager", "sdpa")
# Processor time, so that results do not depend on the machine's load.
_SECONDS_TO_BUILD, _SECONDS_TO_FEED, _SECONDS_FOR_PARTS = 60, 20, 60


def check_type(model_type: str) -> dict[str, Any]:
    """All facts of one model type in the table, as plain data.

    Returns:
        ``model_class``, ``divisor``; ``not_built``: why the type cannot be built, or None; ``not_run``: likewise;
        ``softmax``: whether a softmax over products of two activations was seen; ``sites``: one dict a layer, with
        ``name``, ``class``, ``weights`` and ``statistics``. Each of these two is "verified" or a reason.
    """
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    toy = _Toy(model_type)
    if toy.model is None:
        return {"not_built": toy.problem, "sites": [], "softmax": False}
    result: dict[str, Any] = {
        "model_class": type(toy.model).__name__,
        "divisor": toy.recipe.divisor,
        "parameters": sum(parameter.numel() for parameter in toy.model.parameters()),
        "not_built": None,
        "not_run": toy.problem,
    }
    result.update(_compare(toy))
    return result


class _Toy:
    """The first toy of a type that builds and runs, or builds at least."""

    def __init__(self, model_type: str) -> None:
        self.model: nn.Module | None = None
        self.model_type = model_type
        self.problem: str | None = None
        self.runs: list[tuple[nn.Module, dict[str, Any]]] = []
        end = time.process_time() + _SECONDS_TO_BUILD
        problems: list[str] = []
        for recipe in LADDER:
            for model_class in list(catalogue.classes(model_type))[:3]:
                try:
                    model = build(model_class, shrunk(catalogue.config(model_type), recipe, model_type))
                except Exception as error:
                    problems.append(_say(error))
                    if isinstance(error, ImportError):
                        break
                    continue
                if self.model is None:
                    self.model, self.recipe = model, recipe
                found, why = _runnable(model, model_type)
                if found is not None:
                    self.model, self.recipe, self.runs, self.problem = model, recipe, [(model, found)], None
                    return
                self.problem = self.problem or why
                break
            if time.process_time() > end or (problems and "ImportError" in problems[-1]):
                break
        if self.model is None:
            self.problem = (
                problems[0]
                if problems
                else "no model class of transformers takes its configuration: it is a part of another type"
            )

    recipe: Recipe = LADDER[0]


def _config_around(model: nn.Module, name: str) -> Any:
    """The configuration of a part, or of the nearest module around it that has one."""
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        if hasattr(config, "model_type"):
            return config
    return None


def _runnable(
    model: nn.Module, model_type: str | None, config: Any = None
) -> tuple[dict[str, Any] | None, str]:
    """The first inputs that a model's forward takes; or None and the first error."""
    given, error = first_that_runs(model, feeds(model, model_type, config), _SECONDS_TO_FEED)
    return given, "its forward takes no input that is known" if error is None else _say(error)


def _say(error: BaseException) -> str:
    import traceback

    text = " ".join(str(error).split())
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f" ({os.path.basename(last.filename)}:{last.lineno})"
    return f"{type(error).__name__}: {text[:140]}{where}"


def _compare(toy: _Toy) -> dict[str, Any]:
    model = toy.model
    assert model is not None
    sites = find_attention(model)
    layers, reasons = _read(model, sites)
    heads = {name: layer.heads for name, layer in layers.items()}
    _find_runs(toy, sites)
    weights: dict[str, str] = {}
    statistics: dict[str, list[str]] = {}
    softmax: set[str] = set()
    outside: dict[str, str] = {}
    ran: set[str] = set()
    implementations: list[str] = []
    problems: list[str] = []
    for implementation in IMPLEMENTATIONS:
        if not _use(model, implementation):
            continue
        implementations.append(implementation)
        for part, given in toy.runs:
            trace, captured, problem = _traced(model, part, given, sites, heads)
            if problem is not None:
                problems.append(problem)
                continue
            ran |= trace.ran
            events: dict[str, list[Event]] = {}
            for event in trace.events:
                name, known = layer_of(event, sites)
                if not known:
                    outside[name] = type(event.frames[-1].module).__name__ if event.frames else "function"
                    continue
                events.setdefault(name, []).append(event)
            softmax |= events.keys()
            for name, own in events.items():
                if (name in layers and weights.get(name) != "verified") or name not in weights:
                    weights[name] = _weights(layers, reasons, name, own)
                said = verify_statistics(captured, name, own)
                statistics.setdefault(name, []).append(
                    "verified" if said.ok else f"{said.reason} ({implementation})"
                )
            del trace, events
    rows = []
    for name, module in sites.items():
        row = {"name": name, "class": type(module).__name__, "read": name in layers}
        if name in softmax:
            row["weights"] = weights[name]
            wrong = [said for said in statistics[name] if said != "verified"]
            row["statistics"] = wrong[0] if wrong else "verified"
        elif name in ran or any(one.startswith(name + ".") for one in ran):
            row["weights"] = row["statistics"] = "no softmax"
        else:
            row["weights"] = row["statistics"] = "not run"
        if name in layers:
            row["route"] = layers[name].route
        if name in reasons:
            row["unread"] = reasons[name]
        rows.append(row)
    for name, kind in outside.items():
        why = "its attention layer was not found"
        rows.append({"name": name, "class": kind, "read": False, "weights": why, "statistics": why})
    return {
        "sites": rows,
        "softmax": bool(softmax or outside),
        "implementations": implementations,
        "runs": len(toy.runs),
        **({"problems": problems, "not_run": toy.problem or problems[0]} if problems else {}),
    }


def _read(model: nn.Module, sites: dict[str, nn.Module]) -> tuple[dict[str, HeadProjections], dict[str, str]]:
    """Projections of every layer that can be read, and the reasons of the others."""
    layers: dict[str, HeadProjections] = {}
    try:
        reasons = unread(model) if sites else {}
        if len(reasons) == len(sites):
            return layers, reasons
        reader = ProjectionReader(model)
    except Exception as error:
        return layers, dict.fromkeys(sites, f"reading the model raised {_say(error)}")
    for name in reader:
        try:
            layers[name] = reader[name]
        except Exception as error:  # noqa: PERF203
            reasons[name] = f"reading it raised {_say(error)}"
    return layers, reasons


def _find_runs(toy: _Toy, sites: dict[str, nn.Module]) -> None:
    """Runs of parts of the model for layers that the model's own run leaves out."""
    model = toy.model
    assert model is not None
    ran: set[str] = set()
    for part, given in toy.runs:
        ran |= _ran(model, part, given)
    tried: set[str] = set()
    end = time.process_time() + _SECONDS_FOR_PARTS
    for name in sites:
        if name in ran:
            continue
        for owner_name, owner in _parts_around(model, name):
            if owner_name in tried or time.process_time() > end:
                continue
            tried.add(owner_name)
            found, _ = _runnable(owner, None, _config_around(model, owner_name))
            if found is not None:
                new = _ran(model, owner, found)
                if name in new:
                    toy.runs.append((owner, found))
                    ran |= new
                    break


def _parts_around(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Parts of the model that contain a layer: whole models first, then other modules, outermost first."""
    parts = name.split(".")
    owners = [
        (".".join(parts[:end]), model.get_submodule(".".join(parts[:end])))
        for end in range(1, len(parts) + 1)
    ]
    models = [
        owner for owner in owners if hasattr(owner[1], "main_input_name") and hasattr(owner[1], "config")
    ]
    yield from models
    for owner_name, owner in owners:
        if (owner_name, owner) not in models and not isinstance(
            owner, nn.ModuleList | nn.ModuleDict | nn.Sequential
        ):
            yield owner_name, owner


def _ran(model: nn.Module, part: nn.Module, given: dict[str, Any]) -> set[str]:
    ran: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: ran.add(name))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            part(**given)
    except Exception:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def _use(model: nn.Module, implementation: str) -> bool:
    """Whether the model runs with an implementation; models that know no choice count as eager."""
    set_implementation = getattr(model, "set_attn_implementation", None)
    if set_implementation is None:
        return implementation == "eager"
    try:
        set_implementation(implementation)
    except Exception:
        return False
    return True


def _traced(
    model: nn.Module,
    part: nn.Module,
    given: dict[str, Any],
    sites: dict[str, nn.Module],
    heads: dict[str, int],
) -> tuple[Trace, CapturedCalls, str | None]:
    trace = Trace(model)
    captured = CapturedCalls(model, sites, trace, heads)
    problem = None
    with captured, torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            with trace:
                part(**given)
        except Exception as error:
            problem = _say(error)
    return trace, captured, problem


def _weights(layers: dict[str, Any], reasons: dict[str, str], name: str, events: list[Event]) -> str:
    if name not in layers:
        return reasons.get(name, "it was left out without a reason")
    verdict = verify_weights(layers[name], events)
    return "verified" if verdict.verified else verdict.reason
