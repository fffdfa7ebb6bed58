"""The command ``lightning-qk watch``: a run's report over HTTP, on this machine alone unless asked."""

import getpass
import socket
from argparse import ArgumentTypeError
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lightning_qk._printable import did_you_mean, printable
from lightning_qk.cli._arguments import Failure, OneLineParser
from lightning_qk.inspect.documents import BadInput
from lightning_qk.report.follow import PAGE_NAME, Follower

_PORT = 8771
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class _Server(ThreadingHTTPServer):
    """Serves one page at ``/``; whatever else is asked for is not there.

    Args:
        address: host and port.
        follower: finds the page.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], follower: Follower) -> None:
        self.follower = follower
        self.is_local = address[0] in _LOOPBACK
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """As the base's, without the name that it asks of the network."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        """The page."""
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        """Its headers."""
        self._answer(has_body=False)

    def _answer(self, has_body: bool) -> None:
        # A page of another site may send its visitors here under a name of its own.
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if self.server.is_local and host not in _LOOPBACK:
            self.send_error(403, "asked under another name")
            return
        # No path of a request is ever one of a file.
        if self.path.partition("?")[0] not in ("/", f"/{PAGE_NAME}"):
            self.send_error(404, "only the page is here")
            return
        body = self.server.follower.page()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        if has_body:
            # A page that looks for a newer version reads its top, and leaves.
            with suppress(ConnectionError):
                self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a page asks every three seconds."""


def run(args: list[str], prog: str) -> int:
    """Serve until interrupted.

    Returns:
        The exit status: 0.

    Raises:
        BadInput: a wrong command line; status 1 where the port cannot be had.
    """
    options = parser(prog).parse(args)
    place: Path = options.run
    _check(place)
    try:
        server = serve(place, options.host, options.port)
    except OSError as error:
        raise Failure(
            f"expected an address that is free, got {options.host}:{options.port or _PORT} "
            f"({error.strerror or error}): pass another --port"
        ) from error
    with server:
        for line in _where(server, place):
            print(printable(line), flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def serve(place: Path, host: str = "127.0.0.1", port: int | None = None) -> ThreadingHTTPServer:
    """A server of the newest page of a folder, which listens already.

    Args:
        place: see :class:`~lightning_qk.report.follow.Follower`.
        host: address to listen at.
        port: of it; None takes 8771, or any free one where that is taken.

    Raises:
        OSError: the address cannot be had.
    """
    follower = Follower(place)
    try:
        return _Server((host, _PORT if port is None else port), follower)
    except OSError:
        if port is not None:
            raise
        return _Server((host, 0), follower)


def _check(place: Path) -> None:
    """Raises BadInput unless it is a folder, a record or a page."""
    try:
        if place.is_dir() or (place.is_file() and place.suffix in (".html", ".safetensors")):
            return
        if place.is_file():
            raise BadInput(f"expected a run's folder, its record or its report, got {place}: correct it")
        near = [one.name for one in place.parent.iterdir()] if place.parent.is_dir() else []
    except BadInput:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"expected a run's folder, got {place} ({reason}): correct it") from error
    raise BadInput(
        f"expected a run's folder, got no such folder: {place}{did_you_mean(place.name, near)}; name the log "
        "folder that the run prints"
    )


def _where(server: ThreadingHTTPServer, place: Path) -> list[str]:
    host, port = str(server.server_address[0]), server.server_address[1]
    lines = [f"Report of {place}: http://{host}:{port}/ (Ctrl-C ends it)"]
    if host in _LOOPBACK:
        try:
            user = f"{getpass.getuser()}@"
        except (KeyError, OSError):  # a user without a name
            user = ""
        there = f"{user}{socket.gethostname()}"
        lines.append(f"From another machine: ssh -N -L {port}:127.0.0.1:{port} {there}")
        lines.append("and open the same address there.")
    else:
        lines.append("Anyone who reaches this address can read the report.")
    return lines


def parser(prog: str) -> OneLineParser:
    """The options of ``lightning-qk watch``."""
    own = OneLineParser(
        prog=prog,
        description="Show a run's report in a browser while the run goes on: the newest below a folder, on this "
        "machine's own address, where no other machine reaches it. The page loads itself again when there is a "
        "newer one.",
        epilog=f"example: {prog} runs/quickstart",
    )
    own.add_argument(
        "run", metavar="RUN", type=Path, help="a run's log folder, a folder of runs, a record or a report"
    )
    own.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets every machine in; default: %(default)s",
    )
    own.add_argument("--port", type=_port, help=f"default: {_PORT}, or any that is free where it is taken")
    return own


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) < 65536:
        raise ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}: correct it")
    return int(text)
