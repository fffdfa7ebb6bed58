"""``lightning-qk watch``: one page on the loopback address, the newest, and nothing else of the disk."""

import http.client
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from simulated_run import simulated_record

from lightning_qk.cli.command import main
from lightning_qk.cli.watch import serve
from lightning_qk.report.report import write_report

PAGE, RECORD = "lightning_qk_report.html", "lightning_qk_record.safetensors"


@contextmanager
def served(place: Path) -> Iterator[int]:
    server = serve(place, port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(port: int, path: str = "/", host: str | None = None, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode("utf-8")
    connection.close()
    return answer.status, text


def test_the_page_is_that_of_the_disk_and_follows_it(tmp_path: Path) -> None:
    path = tmp_path / "job" / "version_0" / PAGE
    with served(tmp_path) as port:
        status, text = ask(port)
        assert status == 200
        assert "Nothing is written yet" in text
        assert 'http-equiv="refresh"' in text
        for points in (3, 4):
            write_report(simulated_record(points=points), path, live=True)
            assert ask(port)[1] == path.read_text(encoding="utf-8")
        assert ask(port, method="HEAD") == (200, "")


def test_the_newest_of_several_runs(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old")):
        path = write_report(simulated_record(), tmp_path / name / PAGE)
        path.write_text(name)
        os.utime(path, (time.time() - 100 * age,) * 2)
    with served(tmp_path) as port:
        assert ask(port)[1] == "new"


def test_a_record_without_a_page_becomes_one(tmp_path: Path) -> None:
    record = simulated_record()
    record.save(tmp_path / RECORD)
    with served(tmp_path) as port:
        first = ask(port)[1]
        assert "Attention report: GPT2LMHeadModel" in first
        assert "data-written" in first
        assert ask(port)[1] == first
        record.info["Model"] = "Another"
        record.save(tmp_path / RECORD)
        os.utime(tmp_path / RECORD, (time.time() + 5,) * 2)
        assert "Attention report: Another" in ask(port)[1]


def test_a_damaged_record_is_said_in_the_page(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_bytes(b"<script>x</script>")
    with served(tmp_path) as port:
        status, text = ask(port)
    assert status == 200
    assert "expected a record that a monitor wrote" in text


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt",
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/job/../secret.txt",
        "//etc/passwd",
        "/etc/passwd",
    ],
)
def test_nothing_else_of_the_disk(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "job").mkdir()
    write_report(simulated_record(), tmp_path / "job" / PAGE)
    for place in (tmp_path / "job", tmp_path):
        with served(place) as port:
            status, text = ask(port, path)
            assert status == 404
            assert "secret" not in text


def test_another_name_is_refused(tmp_path: Path) -> None:
    """As a page of another site would ask, whose name leads here."""
    write_report(simulated_record(), tmp_path / PAGE)
    with served(tmp_path) as port:
        assert ask(port, host=f"evil.example:{port}")[0] == 403
        assert ask(port, host=f"localhost:{port}")[0] == 200


def test_only_loopback_unless_asked(tmp_path: Path) -> None:
    server = serve(tmp_path, port=0)
    assert server.server_address[0] == "127.0.0.1"
    server.server_close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}/jbo"], "did you mean 'job'"),
        (["{}/job/nothing/there"], "no such folder"),
        (["{}/notes.txt"], "expected a run's folder, its record or its report"),
        ([], "expected RUN, got none"),
        (["{}/job", "--port", "x"], "expected a port from 0 to 65535"),
        (["a\0b"], "expected a run's folder"),
    ],
)
def test_what_is_wrong_takes_a_sentence(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    assert main(["watch", *(one.replace("{}", str(tmp_path)) for one in arguments)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1


def test_the_command_says_where(tmp_path: Path) -> None:
    write_report(simulated_record(), tmp_path / PAGE)
    command = [sys.executable, "-m", "lightning_qk", "watch", str(tmp_path), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        first, second = process.stdout.readline(), process.stdout.readline()
        port = int(first.split("http://127.0.0.1:")[1].split("/")[0])
        # The command ends its line, so that a terminal of 80 columns does not break it and it can be copied.
        assert second.split(": ", 1)[1].startswith(f"ssh -N -L {port}:127.0.0.1:{port} ")
        assert len(second.split()) == 8
        assert process.stdout.readline() == "and open the same address there.\n"
        assert ask(port)[0] == 200
    finally:
        process.terminate()
        process.wait(30)
