"""What is wrong with what was given, as one sentence."""


class BadInput(ValueError):
    """Something that the caller can mend: a checkpoint, an option or a target that is not what was expected.

    Attributes:
        status: the exit status of a command that is given it.
    """

    status = 2


def one_line(error: BaseException) -> str:
    """The first line that an error says, or its class."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
