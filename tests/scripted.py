"""A web server that keeps bodies by raw path and answers out of turn when told to.

It stands in where no server we can run behaves as Amazon's does: SeaweedFS folds ``a//b`` into
``a/b`` and rclone refuses it, and neither throttles, drops a connection within a body, archives
an object or reports a conflict between two conditional writes on demand.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote_plus, unquote, urlsplit
from xml.sax.saxutils import escape

from workers.messages import StoreOptions


@dataclass
class ScriptedS3:
    """What the server holds and what it will say.

    Attributes
    ----------
    endpoint_url : str
        Where it listens.
    objects : dict of str to bytes
        Bodies by the request's path, exactly as it was sent.
    script : deque of (int, str)
        Status and error code of the next answers; status 0 drops the connection in the body.
    requests : list of str
        Method and path of each request, in order.
    """

    endpoint_url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    script: deque[tuple[int, str]] = field(default_factory=deque)
    requests: list[str] = field(default_factory=list)

    @property
    def options(self) -> StoreOptions:
        """How to reach it."""
        return StoreOptions(endpoint_url=self.endpoint_url, path_style=True, region="us-east-1")


@contextlib.contextmanager
def scripted_s3() -> Iterator[ScriptedS3]:
    """Run one on loopback while the block runs."""
    state = ScriptedS3()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            path = urlsplit(self.path).path
            state.requests.append(f"{self.command} {path}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, code = state.script.popleft() if state.script else (200, "")
            if code:
                answer = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
                self.reply(status, answer)
            elif self.command == "PUT":
                state.objects[path] = body
                self.reply(200, b"")
            elif "list-type=2" in self.path:
                self.reply(200, self.listing(path))
            elif path not in state.objects:
                self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
            else:
                self.reply(200, state.objects[path], broken=status == 0)

        def listing(self, bucket: str) -> bytes:
            """List the way Amazon does for ``encoding-type=url``: a space becomes a plus."""
            assert parse_qs(urlsplit(self.path).query)["encoding-type"] == ["url"]
            keys = [path.removeprefix(f"{bucket}/") for path in state.objects]
            entries = "".join(
                f"<Contents><Key>{escape(quote_plus(unquote(key), safe='/'))}</Key>"
                "<Size>1</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for key in keys
            )
            return (
                "<ListBucketResult><EncodingType>url</EncodingType>"
                f"<IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
            ).encode()

        def reply(self, status: int, body: bytes, *, broken: bool = False) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"tag"')
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if broken else body)
            self.close_connection = broken

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_one  # noqa: N815 - http.server's

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.endpoint_url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
