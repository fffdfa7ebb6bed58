"""The tasks that the ready-made job knows."""

from collections.abc import Sequence

TEXT_TASKS = ("causal_lm", "masked_lm", "sequence_classification")
"""Tasks that :class:`~lightning_qk.TextDataModule` makes batches for."""

CLASSIFICATION_TASKS = ("sequence_classification", "image_classification")

TASKS = (*TEXT_TASKS, "image_classification")


def check_task(task: str, known: Sequence[str] = TASKS) -> None:
    """Raises unless a task is known.

    Args:
        task: name of a task.
        known: the known tasks.

    Raises:
        ValueError: it is unknown; the message names the known ones.
    """
    if task not in known:
        raise ValueError(f"expected a task out of {', '.join(known)}, got {task!r}: pick one of them")
