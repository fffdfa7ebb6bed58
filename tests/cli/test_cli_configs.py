"""Configs by their names."""

import re
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import yaml

from lightning_qk.cli import _configs, main

FOLDER = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_the_names_are_those_of_the_files() -> None:
    assert _configs.names() == NAMES
    assert "quickstart" in NAMES


def test_a_list_of_configs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    entries = re.split(r"\n  (?! )", "\n".join(lines))[1:]
    assert [entry.split()[0] for entry in entries] == NAMES
    assert all(len(entry.split()) > 4 for entry in entries)
    assert max(map(len, lines[1:])) <= 80  # the first has a path


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_printed_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", name]) == 0
    assert capsys.readouterr().out == (FOLDER / f"{name}.yaml").read_text()


def test_a_misspelt_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "quickstrat"]) == 2
    assert capsys.readouterr().err.endswith("got 'quickstrat'; did you mean 'quickstart'?\n")


def test_a_closed_pipe_ends_a_command_quietly() -> None:
    code = (
        "import sys; from lightning_qk.cli import _configs, main\n"
        "_configs.run = lambda *_: print('x' * 10**7) or 0\n"
        "sys.exit(main(['configs']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=PIPE, stderr=PIPE) as command:
        assert command.stdout is not None
        assert command.stdout.read(1) == b"x"
        command.stdout.close()
        assert command.stderr is not None
        assert command.stderr.read() == b""
    assert command.returncode == 0


def test_a_job_takes_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "quickstart", "--config=ddp", "--print_config"])
    assert end.value.code == 0
    job = yaml.safe_load(capsys.readouterr().out)
    assert job["model"]["model"]["model_type"] == "gpt2"
    assert job["trainer"]["devices"] == 2


def test_a_file_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _configs.resolve("quickstart.yaml") == str(FOLDER / "quickstart.yaml")
    Path("quickstart.yaml").write_text("model: {lr: 1.0}\n")
    assert _configs.resolve("quickstart.yaml") == "quickstart.yaml"
    assert _configs.resolve("quickstart") == str(FOLDER / "quickstart.yaml")
    assert _configs.resolve("model: {lr: 1.0}") == "model: {lr: 1.0}"


def test_files_that_are_no_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").touch()
    with pytest.raises(_configs.BadInput, match=r"no such file: jbo.yaml; did you mean 'job.yaml'"):
        _configs.resolve("jbo.yaml")
    with pytest.raises(_configs.BadInput, match="got the folder"):
        _configs.resolve(str(tmp_path))
    Path("picture.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(_configs.BadInput, match="UTF-8"):
        _configs.resolve("picture.yaml")
