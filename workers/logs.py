"""Structured logs: one JSON object per line, with the run, the video and the attempt it is about.

Rooms log through the standard library (``logging.getLogger(__name__)``) and say nothing about
where they are; `log_context` does that once for everything below it. A `RunLog` keeps the lines
in memory and puts them beside the results, under ``_logs/``, whenever it is asked to.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
import logging
import os
import re
import socket
import threading
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any

from workers.storage import Store

LOGGED_PACKAGES = ("jobs", "workers")
"""Loggers that a run keeps; what libraries say stays with them."""

_MAX_BYTES = 4 << 20
_MAX_LINE_BYTES = 64 << 10
_CONTEXT: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar(
    "maskmill_log_context", default=MappingProxyType({})
)
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY")
_SECRET_TEXT = re.compile(
    r"(?i)((?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|sig|access_token)=)[^&\s\"']+"
    r"|(://[^/\s:@]*:)[^/\s@]+(?=@)"
    r"|(\bBearer )[\w.~+/=-]+"
)
_MIN_SECRET_CHARS = 8


@contextlib.contextmanager
def log_context(
    *,
    run_id: str | None = None,
    video: str | None = None,
    video_key: int | None = None,
    attempt_id: str | None = None,
) -> Iterator[None]:
    """Say what every line logged within the block is about; what is None stays as it was.

    Parameters
    ----------
    run_id : str or None
        The run.
    video : str or None
        The video's name.
    video_key : int or None
        The video's key; written as text, which no reader of JSON rounds.
    attempt_id : str or None
        The attempt.

    Yields
    ------
    None
        Nothing; the context holds while the block runs.

    Notes
    -----
    It holds for this thread and its coroutines. A thread started within the block takes it along
    when its target runs through ``contextvars.copy_context().run``.
    """
    key = None if video_key is None else str(video_key)
    given = {"run_id": run_id, "video": video, "video_key": key, "attempt_id": attempt_id}
    token = _CONTEXT.set(
        {**_CONTEXT.get(), **{name: value for name, value in given.items() if value is not None}}
    )
    try:
        yield
    finally:
        _CONTEXT.reset(token)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON.

    The keys are ``time`` (UTC, ISO 8601, milliseconds), ``level``, ``logger``, those of
    `log_context` that are set, ``message``, and ``traceback`` where there is one. Values of
    environment variables that are named like secrets, signatures in URLs and passwords in URLs
    are replaced by ``***``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        entry = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            **_CONTEXT.get(),
            "message": redact(record.getMessage()),
        }
        if record.exc_info:
            entry["traceback"] = redact(self.formatException(record.exc_info))
        return json.dumps(entry, ensure_ascii=False)


class RunLog(logging.Handler):
    """The log lines of one process of a run, kept until they are written to the output.

    Parameters
    ----------
    run_id : str
        The run.
    process : str
        Names this process among all that ever work on the run; see `process_name`.
    max_bytes : int
        Lines kept at most; the oldest beyond it are dropped and counted.

    Notes
    -----
    As a context manager it listens to the loggers of this project while the block runs.
    """

    def __init__(self, run_id: str, process: str, *, max_bytes: int = _MAX_BYTES) -> None:
        super().__init__(logging.INFO)
        self.run_id = run_id
        self.process = process
        self.setFormatter(JsonFormatter())
        self._max_bytes = max_bytes
        self._lines: deque[bytes] = deque()
        self._num_bytes = 0
        self._num_dropped = 0
        self._num_files = 0
        self._writing = threading.Lock()

    def __enter__(self) -> RunLog:
        for name in LOGGED_PACKAGES:
            logger = logging.getLogger(name)
            logger.addHandler(self)
            if logger.getEffectiveLevel() > self.level:
                logger.setLevel(self.level)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name in LOGGED_PACKAGES:
            logging.getLogger(name).removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record; called by `logging` under this handler's lock."""
        try:
            line = self.format(record).encode("utf-8", "backslashreplace")
        except Exception:
            self.handleError(record)
            return
        if len(line) > _MAX_LINE_BYTES:
            line = self._shortened(record, len(line))
        self._lines.append(line + b"\n")
        self._num_bytes += len(line) + 1
        self._make_room()

    def write_to(self, store: Store) -> str | None:
        """Write the kept lines below ``_logs/<run_id>/`` and forget them.

        Parameters
        ----------
        store : Store
            The output.

        Returns
        -------
        str or None
            Key of the new file, or None when there was nothing to write.

        Raises
        ------
        StoreError
            The store did not take it; the lines are kept for the next call.
        """
        with self._writing:
            with self._locked():
                lines, dropped = self._lines, self._num_dropped
                self._lines, self._num_bytes, self._num_dropped = deque(), 0, 0
            if not lines and not dropped:
                return None
            key = f"_logs/{self.run_id}/{self.process}-{self._num_files:05d}.jsonl"
            data = b"".join(lines)
            if dropped:
                data = self._line(f"{dropped} earlier lines were dropped: the log was full") + data
            try:
                store.write_bytes(key, data)
            except BaseException:
                with self._locked():
                    lines.extend(self._lines)
                    self._lines = lines
                    self._num_bytes = sum(map(len, lines))
                    self._num_dropped += dropped
                    self._make_room()
                raise
            self._num_files += 1
            return key

    def _make_room(self) -> None:
        while self._num_bytes > self._max_bytes and self._lines:
            self._num_bytes -= len(self._lines.popleft())
            self._num_dropped += 1

    def _shortened(self, record: logging.LogRecord, num_bytes: int) -> bytes:
        message = redact(record.getMessage())[: _MAX_LINE_BYTES // 8]
        short = logging.makeLogRecord(
            record.__dict__
            | {"msg": f"{message} ... ({num_bytes} bytes, cut)", "args": None, "exc_info": None}
        )
        return self.format(short).encode("utf-8", "backslashreplace")

    def _line(self, message: str) -> bytes:
        record = logging.LogRecord(__name__, logging.WARNING, "", 0, message, None, None)
        return self.format(record).encode() + b"\n"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()


def process_name(role: str) -> str:
    """Return a name for this process that no other, earlier or elsewhere, has.

    Parameters
    ----------
    role : str
        ``driver`` or ``worker``.

    Returns
    -------
    str
        Role, host, process id and a few random digits.
    """
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "host"
    return f"{role}-{host}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def redact(text: str) -> str:
    """Return a text with every secret that can be recognised replaced by ``***``.

    Parameters
    ----------
    text : str
        Anything that may be shown.

    Returns
    -------
    str
        Without values of environment variables that are named like secrets, signatures, bearer
        tokens and passwords in URLs.
    """
    for name, value in os.environ.items():
        if len(value) >= _MIN_SECRET_CHARS and value in text and _SECRET_NAME.search(name.upper()):
            text = text.replace(value, "***")
    return _SECRET_TEXT.sub(_hide, text)


def _hide(match: re.Match[str]) -> str:
    kept: Any = next((group for group in match.groups() if group is not None), "")
    return f"{kept}***"
