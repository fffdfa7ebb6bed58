"""The Python standard library of this machine as a corpus: real text that needs no network."""

import ast
import hashlib
import sysconfig
import tokenize
from collections import Counter
from pathlib import Path

# Third-party packages, test suites, and files that are tables rather than text.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
    | {"pydoc_data", "lib-dynload", "__pycache__"}
)

PACKAGES = (
    "asyncio",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
"""Packages that label the snippets: they are in every Python from 3.10 on, also in Linux distributions'."""


def stdlib_files(root: Path | None = None) -> list[Path]:
    """Python files of the standard library in an order that is scattered, yet the same on every machine.

    They are sorted by a hash of their path, so that the first files and the last are both a fair sample.

    Args:
        root: where the library lies; None is that of the running Python.

    Raises:
        ValueError: no file was found.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    files = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*.py")
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
    }
    if not files:
        raise ValueError(
            f"expected the .py files of the standard library in {root}, found none: use another Python, or "
            "pass files as source"
        )
    return [files[name] for name in sorted(files, key=_scatter)]


def _scatter(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _read(path: Path) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):  # a broken or foreign file does not count
        return ""


def stdlib_texts(
    max_files: int | None = None, max_characters: int | None = None, root: Path | None = None
) -> list[str]:
    """Text of the standard library, one string a file.

    Args:
        max_files: how many files at most.
        max_characters: how many characters at most, all files together; the last text is cut to fit. One file
            gives a quarter at most, so that the files that come first, which differ between Pythons, leave
            room for others.
        root: where the library lies; None is that of the running Python.
    """
    texts: list[str] = []
    left = max_characters
    share = None if max_characters is None else -(-max_characters // 4)
    for path in stdlib_files(root)[:max_files]:
        text = _read(path)[:share][:left]
        if text.strip():
            texts.append(text)
        if left is not None:
            left -= len(text)
            if left <= 0:
                break
    return texts


def stdlib_snippets(
    max_files: int | None = None, max_characters: int | None = None, root: Path | None = None
) -> tuple[list[str], list[str]]:
    """Functions of the standard library, each labelled by the package that it comes from.

    The labels are :data:`PACKAGES`. The snippets are sorted by a hash, as the files are. A text that
    occurs twice is taken once, and large packages are cut to one and a half times the size of the median one,
    so that no class rules.

    Args:
        max_files: how many files at most.
        max_characters: how many characters at most, all snippets together.
        root: where the library lies; None is that of the running Python.

    Returns:
        The texts and their labels.
    """
    base = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    files = [path for path in stdlib_files(root) if path.relative_to(base).parts[0] in PACKAGES]
    found: dict[str, str] = {}
    for path in files[:max_files]:
        package = path.relative_to(base).parts[0]
        for snippet in _functions(_read(path)):
            found.setdefault(snippet, package)
    counts = Counter(found.values())
    limit = 3 * sorted(counts.values())[len(counts) // 2] // 2 if counts else 0
    taken: Counter[str] = Counter()
    texts: list[str] = []
    labels: list[str] = []
    left = max_characters
    for text, package in sorted(found.items(), key=lambda item: _scatter(item[0])):
        if taken[package] >= limit or (left is not None and len(text) > left):
            continue
        taken[package] += 1
        texts.append(text)
        labels.append(package)
        if left is not None:
            left -= len(text)
    return texts, labels


def _functions(text: str) -> list[str]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    lines = text.splitlines()
    snippets = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            part = lines[node.lineno - 1 : node.end_lineno]
            # A function of one or two lines says nothing about its package.
            if len(part) >= 4:
                snippets.append("\n".join(line.removeprefix(" " * node.col_offset) for line in part))
    return snippets
