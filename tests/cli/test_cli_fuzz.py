"""Wrong command lines of every kind: one sentence and status 2, never a traceback."""

import random
from pathlib import Path

import pytest

from lightning_qk.cli import main

OPTIONS = {
    "inspect": [
        "--per-head", "--compare", "--moments-only", "--fold-norm", "--support", "--json", "--csv", "--html",
        "--fail-on", "--text", "--tokenizer", "--length", "--batches", "--base", "--config", "--prefix",
        "--revision", "--series",
    ],
    "verify": ["--text", "--tokenizer", "--length", "--json", "--base", "--config", "--prefix", "--revision"],
    "report": ["--output", "--parquet"],
    "wandb-workspace": ["--name", "--print", "--json"],
    "configs": [],
    "completion": [],
}  # fmt: skip


def values(folder: Path) -> list[str]:
    return [
        "", "-1", "0", "1e9", "nan", "inf", "x", "--", "-", "=", "a/b/c", "~nobody/x", "\x1b[31mred", "\udcff", "x" * 300,  # noqa: E501
        "/" + "x" * 5000, ".", "..", "/dev/null", str(folder / "empty"), str(folder / "file"), str(folder / "missing"),  # noqa: E501
        str(folder / "file" / "below"), str(folder), "--nonsense", "--nonsense=1", "qk/eig_var>", "[red]", "%s", "{}",  # noqa: E501
    ]  # fmt: skip


@pytest.mark.parametrize("command", OPTIONS)
def test_wrong_lines(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    (tmp_path / "file").write_text("text")
    source, choices = random.Random(command), values(tmp_path)
    refused = 0
    for _ in range(60):
        line = [command]
        for _ in range(source.randrange(1, 5)):
            own = OPTIONS[command]
            option = source.choice(own) if own and source.random() < 0.6 else None
            value = source.choice(choices)
            line += (
                [value]
                if option is None
                else [f"{option}={value}"]
                if source.random() < 0.5
                else [option, value]
            )
        if command == "wandb-workspace" and not {"--print", "--json"} & set(line):
            line.insert(1, "--print")  # else it would ask the network
        capsys.readouterr()
        try:
            status = main(line)
        except SystemExit as end:
            status = int(str(end.code))
        seen = capsys.readouterr()
        assert not set(seen.out + seen.err) & {"\x1b"}, line
        assert status in (0, 2), (line, seen.err)
        if status == 2:
            refused += 1
            assert seen.err.count("\n") == 1, (line, seen.err)
            assert seen.err.startswith("lightning-qk"), (line, seen.err)
            assert "Traceback" not in seen.err
    assert refused
