"""The reports under a folder, served to this machine alone."""

import shutil
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tasft.core.errors import UserError
from tasft.report.index import listing
from tasft.report.page import page

HOST = "127.0.0.1"
TYPES = {"index.html": "text/html; charset=utf-8", "report.md": "text/plain; charset=utf-8", "results.csv": "text/csv"}
"""The files of a report that are served; no other file is, neither replies nor weights."""


class _Handler(BaseHTTPRequestHandler):
    server: "Viewer"

    def do_GET(self) -> None:
        # Else a page elsewhere, by a name of its own for this address, could read along.
        if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        path = unquote(urlsplit(self.path).path)
        if path == "/":
            body = page(listing(self.server.folder)).encode()
            self._head(TYPES["index.html"], len(body))
            self.wfile.write(body)
            return
        file = self.server.file(path)
        if file is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with file.open("rb") as opened:
            self._head(TYPES[file.name], file.stat().st_size)
            shutil.copyfileobj(opened, self.wfile)

    def _head(self, kind: str, length: int) -> None:
        self.send_response(HTTPStatus.OK)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(length),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Resource-Policy": "same-origin",
        }.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Viewer(ThreadingHTTPServer):
    """A server of the reports under a folder.

    Args:
        folder: Where they are.
        port: 0 takes a free one.

    Raises:
        UserError: There is no such folder, or the port cannot be listened on.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder; give one with runs in it, such as runs")
        self.folder = folder.resolve()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: cannot be listened on ({error})") from None

    @property
    def address(self) -> str:
        """Of the list."""
        return f"http://{HOST}:{self.server_port}/"

    def file(self, path: str) -> Path | None:
        """The file of a report that a request names; None for anything else."""
        begin, _, relative = path.lstrip("/").partition("/")
        asked = self.folder / relative
        if begin != "files" or asked.name not in TYPES or asked.parent.name != "report":
            return None
        try:
            resolved = asked.resolve(strict=True)
        except (OSError, ValueError):
            return None
        # Neither `..` nor a link may lead elsewhere.
        return (
            resolved
            if resolved.is_relative_to(self.folder) and resolved.name == asked.name and resolved.is_file()
            else None
        )


def view(folder: Path, port: int) -> None:
    """Serve until interrupted."""
    with Viewer(folder, port) as server:
        print(f"reports: {server.address} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
