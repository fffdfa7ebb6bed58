"""The tasks that the ready-made job knows."""

TASKS = ("causal_lm", "masked_lm", "sequence_classification")


def check_task(task: str) -> None:
    """Make sure that a task is known.

    Raises:
        ValueError: it is not; the message names those that are.
    """
    if task not in TASKS:
        raise ValueError(f"expected a task out of {', '.join(TASKS)}, got {task!r}: correct the spelling")
