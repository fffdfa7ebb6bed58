"""Text of this machine's Python in the layout of the data folder, to see that all runs without a download.

The numbers that come of it say nothing about the paper.
"""

import re
from pathlib import Path

from lightning_qk.data.stdlib import stdlib_snippets, stdlib_texts

_CHARACTERS = 2_500_000
_WORDS_A_LINE = 200  # enough for the long paragraphs that experiments look for
_ROWS = 12_000


def stand_in(folder: Path) -> Path:
    """Write ``wikitext-2/`` and ``sst2/`` unless they are there; returns the folder.

    Language is the standard library's words and signs, half of its files each in ``valid.txt`` and ``test.txt``;
    sentences are lines of code, and whether one comes of a package that is early in the alphabet is its label.
    """
    if (folder / "sst2" / "dev.tsv").is_file():
        return folder
    texts = stdlib_texts(max_characters=_CHARACTERS)
    for name, part in (("valid", texts[::2]), ("test", texts[1::2])):
        words = re.findall(r"\w+|[^\w\s]", "\n".join(part))
        lines = [
            " ".join(words[start : start + _WORDS_A_LINE]) for start in range(0, len(words), _WORDS_A_LINE)
        ]
        _write(folder / "wikitext-2" / f"{name}.txt", lines)
    snippets, packages = stdlib_snippets()
    middle = sorted(set(packages))[len(set(packages)) // 2]
    rows = [
        f"{' '.join(line.split())}\t{int(package < middle)}"
        for snippet, package in zip(snippets, packages, strict=True)
        for line in snippet.splitlines()
        if len(line.split()) >= 4
    ][:_ROWS]
    cut = len(rows) - len(rows) // 5
    _write(folder / "sst2" / "train.tsv", ["sentence\tlabel", *rows[:cut]])
    _write(folder / "sst2" / "dev.tsv", ["sentence\tlabel", *rows[cut:]])
    return folder


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
