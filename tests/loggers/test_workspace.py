"""The W&B workspace that is built offline, and the command that makes it."""

import json
from typing import Any

import pytest

from lightning_qk.cli import main
from lightning_qk.cli import workspace as workspace_command
from lightning_qk.loggers.loggers import WANDB_STEP
from lightning_qk.loggers.workspace import GROUPS, build_workspace, workspace_json


def test_the_spec_has_the_sections_in_order_with_their_panels() -> None:
    spec = json.loads(workspace_json(build_workspace("team", "project")))
    bank = spec["section"]["panelBankConfig"]
    sections = [section for section in bank["sections"] if section["panels"]]
    assert [section["name"] for section in sections] == [group.title for group in GROUPS]
    assert "Health" in sections[0]["name"]
    assert sections[0]["isOpen"]
    assert not bank["settings"]["sortAlphabetically"]
    for section, group in zip(sections, GROUPS, strict=True):
        for panel, chart in zip(section["panels"], group.charts, strict=True):
            config = panel["config"]
            assert config["chartTitle"] == chart.title
            if chart.images:
                assert panel["viewType"] == "Media Browser"
                assert config["mediaKeys"] == list(chart.keys)
                continue
            assert panel["viewType"] == "Run History Line Plot"
            assert config["xAxis"] == WANDB_STEP
            assert config.get("metrics", []) == list(chart.keys)
            assert config.get("metricRegex") == chart.regex
            assert bool(config.get("yLogScale")) == chart.log


def test_json_and_print_need_no_account(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wandb-workspace", "team/project", "--json"]) == 0
    assert "guard/score" in json.dumps(json.loads(capsys.readouterr().out))
    assert main(["wandb-workspace", "team/project", "--print", "--name", "Mine"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Mine\n  1 Health\n")
    assert "attn/heatmap/entropy_normalized" in out


@pytest.mark.parametrize("given", ["project", "/project", "team/", "team/project/more"])
def test_a_wrong_project_is_a_sentence(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wandb-workspace", given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "expected ENTITY/PROJECT" in error


def test_without_network_it_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(workspace: Any) -> str:
        raise ConnectionError("Failed to resolve\n'api.wandb.ai'")

    monkeypatch.setattr(workspace_command, "_save", refuse)
    assert main(["wandb-workspace", "team/project"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "could not be saved to team/project (Failed to resolve 'api.wandb.ai')" in error
    assert "wandb login" in error


def test_it_is_saved_once_and_its_address_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb_workspaces.workspaces as ws

    saved: list[Any] = []
    monkeypatch.setattr(ws.Workspace, "save", lambda self: saved.append(self) or self)
    monkeypatch.setattr(ws.Workspace, "url", property(lambda self: "https://wandb.ai/team/project?nw=abc"))
    assert main(["wandb-workspace", "team/project"]) == 0
    assert capsys.readouterr().out == "https://wandb.ai/team/project?nw=abc\n"
    ((workspace),) = saved
    assert (workspace.entity, workspace.project, workspace.name) == ("team", "project", "Attention health")


def test_without_the_package_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "wandb_workspaces"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["wandb-workspace", "team/project"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert 'pip install "lightning-qk[wandb]"' in error


def test_what_may_be_negative_is_on_a_linear_axis() -> None:
    charts = [chart for group in GROUPS for chart in group.charts if chart.log]
    assert charts
    assert not [chart.title for chart in charts if "eig_" in f"{chart.keys} {chart.regex}"]
