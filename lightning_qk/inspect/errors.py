"""What is wrong with what was given, as one sentence."""


class BadInput(ValueError):
    """Something that the caller can mend: a checkpoint, an option or a target that is not what was expected.

    Attributes:
        status: the exit status of a command that is given it.
    """

    status = 2


_LONGEST = 300
"""Characters of an error of others that are quoted."""


def one_line(error: BaseException) -> str:
    """The first line that an error says, or its class."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # what a library's error holds may have no text
        lines = []
    line = lines[0].rstrip(".:") if lines else type(error).__name__
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
