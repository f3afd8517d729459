"""A server that speaks the part of the Hugging Face hub that downloads speak.

The hub is out of reach of tests, and what matters about it is on the wire: redirect-free answers to
HEAD and GET below ``/ORG/NAME/resolve/REVISION/FILE``, digests as entity tags, commits and error
codes in headers. So the real client library talks to this real server over a socket; a mock of
the library would only confirm what we believe of it.

    python -m tests.hub FOLDER

serves ``FOLDER/ORG/NAME/COMMIT/FILE`` and prints its URL; the revision ``main`` is the commit that
the file ``FOLDER/ORG/NAME/main`` names. The word ``gated`` in a name refuses, ``broken`` fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMITS = ("a" * 40, "b" * 40)
"""An older and the newest commit of every model that `Hub.add` makes."""


@dataclass(frozen=True, slots=True)
class Hub:
    """A running server.

    Attributes
    ----------
    url : str
        What ``HF_ENDPOINT`` must be.
    folder : Path
        What it serves.
    """

    url: str
    folder: Path

    def add(self, repository: str, file_name: str, data: bytes, old: bytes | None = None) -> None:
        """Put a file into a model, and another content of it into an older commit."""
        home = self.folder / repository
        for commit, content in zip(COMMITS, (old, data), strict=True):
            if content is not None:
                (home / commit).mkdir(parents=True, exist_ok=True)
                (home / commit / file_name).write_bytes(content)
        (home / "main").write_text(COMMITS[1])

    def requests(self) -> list[str]:
        """Return what was asked for so far, a method and a path each."""
        return (self.folder / "requests.log").read_text().splitlines()


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Hub]:
    """Run a server in a process of its own."""
    (folder / "requests.log").touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.hub", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    try:
        assert process.stdout is not None
        yield Hub(process.stdout.readline().strip(), folder)
    finally:
        process.kill()
        process.wait()


class _Handler(BaseHTTPRequestHandler):
    folder: Path

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        content = self._answer()
        if content is not None:
            self.wfile.write(content)

    def _answer(self) -> bytes | None:
        with (self.folder / "requests.log").open("a") as log:
            log.write(f"{self.command} {self.path}\n")
        repository, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, file_name = rest.partition("/")
        home = self.folder / repository
        named = home / revision
        commit = named.read_text() if named.is_file() else revision
        path = home / commit / file_name
        if not path.is_file():
            self._refuse(repository, commit)
            return None
        content = path.read_bytes()
        digest = path.with_name(f"{file_name}.etag")
        etag = digest.read_text() if digest.is_file() else hashlib.sha256(content).hexdigest()
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def _refuse(self, repository: str, commit: str) -> None:
        if "broken" in repository:
            self.send_response(400)
        elif "gated" in repository:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
        else:
            self.send_response(404)
            home = self.folder / repository
            code = "EntryNotFound" if (home / commit).is_dir() else "RevisionNotFound"
            self.send_header("X-Error-Code", code if home.is_dir() else "RepoNotFound")
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Stay silent."""


if __name__ == "__main__":
    _Handler.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
