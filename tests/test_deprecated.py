"""Old spellings of arguments and attributes: each works as the new one does, with a warning."""

import ast
import inspect
from pathlib import Path

import jsonargparse
import lightning as L
import models
import pytest
import torch

import lightning_qk
from lightning_qk import (
    AttentionPrior,
    DifferentiableAttentionMask,
    EntropyBand,
    QKClip,
    UpdateCap,
    cap_updates,
    clip_qk,
    head_projections,
)
from lightning_qk.capture import AttentionCapture
from lightning_qk.interventions import UpdateCapper

RENAMED = {
    "QKClip": (lambda **given: QKClip(**given).settings(), {"tau": 3.0}, {"cap": 3.0}),
    "UpdateCap": (lambda **given: UpdateCap(**given).settings(), {"tau": 0.2}, {"cap": 0.2}),
    "UpdateCapper": (lambda **given: UpdateCapper(models.gpt2(), **given)._cap, {"tau": 0.2}, {"cap": 0.2}),
    "cap_updates": (lambda **given: capped(**given), {"tau": 1e-3}, {"cap": 1e-3}),
    "clip_qk": (lambda **given: clipped(**given), {"tau": 2.0}, {"cap": 2.0}),
}
REORDERED = {
    "AttentionPrior": (AttentionPrior, ("window", 0.3), {"prior": "window", "weight": 0.3}),
    "DifferentiableAttentionMask": (DifferentiableAttentionMask, (16,), {"max_length": 16}),
    "EntropyBand": (EntropyBand, (0.2, 0.8, 0.3), {"low": 0.2, "high": 0.8, "weight": 0.3}),
}
ATTRIBUTES = {
    "AttentionCapture": (lambda: AttentionCapture({}, print), "heard", "seen"),
    "LocAteR": (lambda: lightning_qk.LocAteR(1.0), "account", "event_log"),
    "QKClip": (QKClip, "tau", "cap"),
    "UpdateCap": (UpdateCap, "tau", "cap"),
}


def capped(**given):
    torch.manual_seed(0)
    model = models.gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    end = cap_updates(model, optimizer, **given)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    end()
    return [parameter.detach().sum().item() for parameter in model.parameters()]


def clipped(**given):
    torch.manual_seed(0)
    model = models.gpt2()
    name, layer = next(iter(head_projections(model).items()))
    return clip_qk(model, {name: torch.full((len(layer.query),), 8.0)}, **given)[name].tolist()


@pytest.mark.parametrize("name", RENAMED)
def test_arguments_under_their_old_names(name):
    call, old, new = RENAMED[name]
    with pytest.warns(DeprecationWarning, match=f"{min(old)} of {name} is {min(new)} now") as said:
        got = call(**old)
    assert [one.filename for one in said] == [__file__]
    assert got == call(**new)


@pytest.mark.parametrize("name", REORDERED)
def test_arguments_in_their_old_order(name):
    kind, old, new = REORDERED[name]
    for count in range(1, len(old) + 1):
        with pytest.warns(DeprecationWarning, match=f"{name} takes {', '.join([*new][:count])} by name now"):
            got = kind(*old[:count])
        assert got.settings() == kind(**dict([*new.items()][:count])).settings()
    with pytest.raises(TypeError, match="at most"):
        kind(*old, None)
    with pytest.raises(TypeError, match="once"):
        kind(*old, **new)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_under_their_old_names(name):
    make, old, new = ATTRIBUTES[name]
    kept = make()
    with pytest.warns(DeprecationWarning, match=f"{name}.{old} is {new} now") as said:
        assert getattr(kept, old) == getattr(kept, new)
    assert said[0].filename == __file__


def test_no_old_spelling_is_forgotten_here():
    root = Path(lightning_qk.__file__).parent
    decorated, attributes = set(), set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for one in node.body if isinstance(node, ast.ClassDef | ast.Module) else ():
                where = node.name if isinstance(node, ast.ClassDef) else getattr(one, "name", "")
                decorators = getattr(one, "decorator_list", ())
                decorated |= {where for own in decorators if ast.unparse(own).startswith("old_spellings(")}
                if isinstance(one, ast.Assign) and ast.unparse(one.value).startswith("OldName("):
                    attributes.add((where, one.targets[0].id))
    assert decorated == {*RENAMED, *REORDERED}
    assert {(name if old != "account" else "Callback", old) for name, (_, old, _) in ATTRIBUTES.items()} == {
        ("AttentionCapture" if where == "Capture" else where, old) for where, old in attributes
    }


def test_both_spellings_are_refused():
    with pytest.raises(TypeError, match="expected cap of QKClip once, got tau too"):
        QKClip(cap=50.0, tau=3.0)
    with pytest.raises(TypeError, match="cap"):
        cap_updates(models.gpt2(), None)


def test_configs_of_a_command_line_may_have_old_names_and_are_saved_with_new_ones():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.Callback, "callback")
    for name in ("QKClip", "UpdateCap"):
        plain = parser.parse_object({"callback": {"class_path": f"lightning_qk.{name}"}})
        assert "tau" not in plain.callback.init_args
        old = {"callback": {"class_path": f"lightning_qk.{name}", "init_args": {"tau": 7.0}}}
        with pytest.warns(DeprecationWarning, match="tau"):
            made = parser.instantiate_classes(parser.parse_object(old)).callback
        assert made.cap == 7.0
        assert "tau" not in made.settings()
    with pytest.raises(jsonargparse.ArgumentError):
        parser.parse_object({"callback": {"class_path": "lightning_qk.QKClip", "init_args": {"tau": "high"}}})
    assert "tau" in inspect.signature(QKClip).parameters
