"""Files that appear whole or not at all."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_COUNT = itertools.count()
# Of a file's name, in that of its beginnings: names have a limit of 255 bytes, and characters up to 4.
_KEPT = 40


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Where to write what is to become a file: it takes its place when the block ends, and is gone if it fails.

    The file has the permissions of any new file (0666 less the umask), whatever those of what was written into its
    place. A link stays a link: the file that it points to is replaced. What is no file, such as ``/dev/null`` or a
    pipe, is written to directly.

    Args:
        path: the file. Its folder is created.

    Raises:
        OSError: it cannot be written there.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    if path.is_symlink():
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:_KEPT]}.{os.getpid()}.{next(_COUNT)}.partial")
    try:
        mode = _new(partial)
        yield partial
        with suppress(OSError):  # not every file system has permissions
            partial.chmod(mode)
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _new(path: Path) -> int:
    """Make an empty file. The permissions that the system gives it are those of 0666 less the umask."""
    path.unlink(missing_ok=True)  # of a process that had the same number and was killed
    with path.open("xb") as file:
        return os.fstat(file.fileno()).st_mode & 0o777
