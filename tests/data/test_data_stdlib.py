"""The standard library as a corpus."""

from collections import Counter
from pathlib import Path

import pytest

from lightning_qk.data.stdlib import PACKAGES, stdlib_files, stdlib_snippets, stdlib_texts


@pytest.fixture
def library(tmp_path: Path) -> Path:
    function = "def {name}(x):\n    a = x\n    b = a\n    return b\n"
    for package, count in (("email", 2), ("json", 1), ("http", 2), ("test", 1), ("site-packages/email", 1)):
        for index in range(count):
            path = tmp_path / package / f"file{index}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(function.format(name=f"{package.split('/')[0]}_{index}"))
    return tmp_path


def test_files_are_the_library_without_tests_and_installed_packages(library: Path) -> None:
    files = [path.relative_to(library).as_posix() for path in stdlib_files(library)]

    assert sorted(files) == [
        "email/file0.py",
        "email/file1.py",
        "http/file0.py",
        "http/file1.py",
        "json/file0.py",
    ]
    assert files == [path.relative_to(library).as_posix() for path in stdlib_files(library)]


def test_a_folder_without_python_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected the \.py files of the standard library"):
        stdlib_files(tmp_path)


def test_texts_are_bounded(library: Path) -> None:
    assert len(stdlib_texts(max_files=2, root=library)) == 2
    texts = stdlib_texts(max_characters=100, root=library)
    assert sum(map(len, texts)) == 100
    assert max(map(len, texts)) == 25
    assert texts == [
        path.read_text()[: len(text)] for path, text in zip(stdlib_files(library), texts, strict=False)
    ]


def test_a_broken_file_is_passed_over(library: Path) -> None:
    (library / "email" / "file0.py").write_bytes(b"\xff\xfe broken")
    (library / "email" / "file1.py").write_text("def f(:\n  pass\n")

    texts, labels = stdlib_snippets(root=library)

    assert set(labels) == {"http"}
    assert len(stdlib_texts(root=library)) == 4
    assert len(texts) == 2


def test_snippets_are_functions_labelled_by_their_package(library: Path) -> None:
    body = "async def method(self):\n        one = 1\n        two = 2\n        return one, two\n"
    (library / "http" / "file1.py").write_text(
        "class A:\n    " + body + "\n    def short(self):\n        pass\n"
    )

    found = dict(zip(*stdlib_snippets(root=library), strict=True))

    assert found["async def method(self):\n    one = 1\n    two = 2\n    return one, two"] == "http"
    assert found["def email_0(x):\n    a = x\n    b = a\n    return b"] == "email"
    assert not any("short" in text for text in found)
    assert "json" not in found.values()


def test_real_snippets_make_a_task_without_a_ruling_class() -> None:
    texts, labels = stdlib_snippets()

    counts = Counter(labels)
    assert len(counts) >= 6
    assert set(counts) <= set(PACKAGES)
    assert len(set(texts)) == len(texts)
    assert max(counts.values()) < 0.3 * len(labels)
    assert min(counts.values()) > 0.02 * len(labels)
