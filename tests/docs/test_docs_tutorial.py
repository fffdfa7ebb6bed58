"""The tutorial, typed as it stands, with fewer and smaller steps."""

import glob
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from pages import check_command, commands, run_python

from lightning_qk.cli import main

PAGE = "docs/tutorial.md"
SMALL = [
    *("--trainer.max_steps", "4", "--trainer.log_every_n_steps", "2", "--trainer.val_check_interval", "4"),
    *(
        "--trainer.limit_val_batches",
        "1",
        "--trainer.accelerator",
        "cpu",
        "--trainer.enable_progress_bar",
        "false",
    ),
    *("--data.max_characters", "60000", "--data.cache_dir", "cache", "--data.batch_size", "4"),
    *("--model.model.n_layer", "2", "--model.model.n_embd", "32", "--data.block_size", "32"),
]


@pytest.fixture
def fresh_wandb() -> Iterator[None]:
    """Without W&B's service of another test, and leaving none: it goes on in the folder that it was started in."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.usefixtures("fresh_wandb")
def test_the_tutorial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in commands(PAGE):
        words, _, target = line.partition(" > ")
        program, *arguments = shlex.split(words)
        if program != "lightning-qk":
            check_command(line)
            continue
        arguments = [path for word in arguments for path in (glob.glob(word) if "*" in word else [word])]
        capsys.readouterr()
        # What is given last counts, so that small sizes go before the options that a step is about.
        small = [option for option in SMALL if arguments[0] == "fit"]
        own = [word for word in arguments[3:] if word not in ("--trainer.max_steps", "200")]
        assert main([*arguments[:3], *small, *own] if small else arguments) == 0
        wandb.finish()
        if target:
            Path(target).write_text(capsys.readouterr().out)
        elif "fit" in arguments:
            assert "Attention health" in capsys.readouterr().out
    assert len(os.listdir("runs/quickstart/lightning-qk")) == 3
    assert len(Path("heads.csv").read_text().splitlines()) == 1 + 3 * 2 * 4
    _, printed = run_python(PAGE)
    assert printed.startswith("torch.Size([2, 8])")
