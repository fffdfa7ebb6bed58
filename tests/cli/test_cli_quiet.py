"""What libraries say on a run of the command: nothing that nobody can act on, and no line broken in a word."""

import io
import logging
import sys
import warnings

import pytest

from lightning_qk.cli import main
from lightning_qk.cli._quiet import quiet_libraries

PATH = "runs/classification/lightning-qk/c3whgqhl/checkpoints/" + "x" * 60 + ".ckpt"
SENTENCE = f"the weights of the last run of all are those of {PATH} and of no other file that is there at all"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_lines_end_between_words_on_a_terminal(
    kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stderr", out := kind())
    # Its own handler depends on whether pytest had set up logging when it was imported, and on the other package.
    lightning = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(lightning, "handlers", [logging.StreamHandler()])
    monkeypatch.setattr(lightning, "propagate", False)
    with quiet_libraries():
        lightning.warning(SENTENCE)
        # As warnings are shown; pytest keeps them to itself.
        sys.stderr.write(warnings.formatwarning(UserWarning(SENTENCE), UserWarning, "library.py", 7))

    lines = out.getvalue().splitlines()
    assert " ".join(lines) == f"{SENTENCE} {SENTENCE}"  # no place in a library before the warning
    if kind is Terminal:
        assert [line for line in lines if len(line) > 80] == [PATH, PATH]
    else:
        assert lines == [SENTENCE, SENTENCE]


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_an_error_too_ends_its_lines_between_words(
    kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stderr", out := kind())
    assert main(["inspekt"]) == 2
    lines = out.getvalue().splitlines()
    assert (max(map(len, lines)) <= 80) == (kind is Terminal)
    assert " ".join(lines).endswith("got 'inspekt'; did you mean 'inspect'?; see lightning-qk --help")


def test_what_nobody_can_act_on_is_not_said(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("sys.stderr", out := io.StringIO())
    as_before = warnings.formatwarning
    with quiet_libraries():
        warnings.warn("The dirpath has changed from 'a' to 'b', therefore …", stacklevel=1)
        warnings.warn("The 'val_dataloader' does not have many workers", stacklevel=1)
        logging.getLogger("lightning.pytorch").info("💡 Tip: buy this")
        warnings.warn("something else", stacklevel=1)
    assert [str(one.message) for one in recwarn] == ["something else"]
    assert out.getvalue() == ""
    assert warnings.formatwarning is as_before
