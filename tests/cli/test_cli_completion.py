"""Completions, in the shells themselves."""

import contextlib
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_qk.cli import main
from lightning_qk.cli._completion import SHELLS

# What is typed, and what is among, or not among, the completions.
TYPED = [
    (["lightning-qk", ""], {"fit", "inspect", "report", "completion"}),
    (["lightning-qk", "insp"], {"inspect"}),
    (["lightning-qk", "fit", "--config", "qui"], {"quickstart"}),
    (["lightning-qk", "fit", "--config", "jo"], {"job.yaml"}),
    (["lightning-qk", "fit", "--config", "quickstart", "--model.ta"], {"--model.task"}),
    (["lightning-qk", "fit", "--model.task", "caus"], {"causal_lm"}),
    (["lightning-qk", "validate", "--ckpt"], {"--ckpt_path"}),
    (["lightning-qk", "inspect", "--mom"], {"--moments-only"}),
    (["lightning-qk", "inspect", "--support", ""], {"model", "head"}),
    (["lightning-qk", "inspect", "job"], {"job.yaml"}),
    (["lightning-qk", "configs", "qu"], {"quickstart"}),
    (["lightning-qk", "completion", "z"], {"zsh"}),
    (["lightning-qk", "cost", "--ran"], {"--ranks"}),
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script of each shell, and a file to complete."""
    pytest.importorskip("shtab")
    folder = tmp_path_factory.mktemp("completion")
    (folder / "job.yaml").touch()
    for shell in SHELLS:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(["completion", shell]) == 0
        (folder / f"script.{shell}").write_text(out.getvalue())
    return folder


def completions(shell: str, folder: Path, typed: list[str]) -> set[str]:
    """What a shell makes of TAB behind the last word."""
    if shell == "bash":
        words = " ".join(f"'{word}'" for word in typed)
        code = (
            f"source script.bash; COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; COMPREPLY=();"
            "function=$(complete -p lightning-qk | sed 's/.*-F \\([^ ]*\\).*/\\1/'); $function 2>/dev/null; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
    else:
        code = f"source script.fish; complete -C '{' '.join(typed)}'"
    done = subprocess.run(
        [shell, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=True
    )
    return {line.split("\t")[0] for line in done.stdout.splitlines() if line}


@pytest.mark.parametrize("shell", ["bash", "fish"])
@pytest.mark.parametrize(
    ("typed", "expected"),
    TYPED,
    ids=lambda value: " ".join(value if isinstance(value, list) else sorted(value)),
)
def test_what_tab_completes(scripts: Path, shell: str, typed: list[str], expected: set[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    found = completions(shell, scripts, typed)
    assert expected <= found
    if typed[-1]:  # nothing that does not begin so
        assert all(word.startswith(typed[-1]) for word in found)


def test_zsh_can_read_its_script(scripts: Path) -> None:
    script = (scripts / "script.zsh").read_text()
    assert script.startswith("#compdef lightning-qk\n")
    assert "quickstart" in script
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    subprocess.run(["zsh", "-n", "script.zsh"], cwd=scripts, check=True)


def test_a_shell_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "ksh"]) == 2
    assert "'ksh'" in capsys.readouterr().err


def test_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err.endswith("got none: pip install shtab\n")
