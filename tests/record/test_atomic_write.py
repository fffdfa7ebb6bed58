"""Files appear whole or not at all, with the permissions of any new file."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_qk.record.atomic_write import whole_file
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.parquet import write_history
from lightning_qk.report.report import write_report


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_the_umask_decides_who_may_read(umask: int, tmp_path: Path) -> None:
    record, history = RunRecord(), History(["layer_00"], [2])
    history.append(1, {"eig_mean": torch.rand(2), "eig_var": torch.rand(2)})
    record.spectrum = history
    written = [
        record.save(tmp_path / "record.safetensors"),
        write_report(record, tmp_path / "report.html"),
        write_history(record, tmp_path / "history.parquet"),
    ]
    for path in written:
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name
    record.save(written[0])  # in the place of another
    assert written[0].stat().st_mode & 0o777 == 0o666 & ~umask
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in written)


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(OSError, match="full"), whole_file(path) as partial:  # noqa: PT012
        partial.write_text("half")
        raise OSError("full")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="links and devices are POSIX's")
def test_links_stay_links_and_devices_devices(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for text in ("new", "newer"):
        with whole_file(tmp_path / "link") as partial:
            partial.write_text(text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_text() == text
    with whole_file("/dev/null") as place:
        assert place == Path("/dev/null")


def test_names_as_long_as_they_may_be(tmp_path: Path) -> None:
    with whole_file(tmp_path / ("n" * 250)) as partial:
        partial.write_text("text")
    assert (tmp_path / ("n" * 250)).read_text() == "text"


def test_a_full_disk_at_the_record_is_an_error_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*args: object, **options: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        RunRecord().save(tmp_path / "record.safetensors")
    assert not os.listdir(tmp_path)
