"""A function in a process of its own: where native code crashes or hangs, one call is lost.

Decoders are megabytes of native code that read what anybody uploaded. The process here is a plain
Python that imports one function, not one of `multiprocessing`: those run the caller's main module
again, which a notebook does not have and a script may not survive.

The child reads its calls from a socket. When the caller ends, however it ends, the socket closes
and the child with it. It stands in a session of its own, so a Ctrl-C in the terminal is the
caller's alone, and it asks to be the first that the kernel kills when memory runs out.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, TypeVar

from workers.errors import MaskmillError

_NICENESS = 10
_START_WITHIN_S = 120.0
_END_WITHIN_S = 5.0
_PROGRAM = """\
import sys
name, *sys.path = sys.argv[1:]
from jobs.isolation import serve
serve(name)
"""

Result = TypeVar("Result")


class CallLostError(Exception):
    """The process died, or was ended, under a call; the next call gets a new process."""


class CannotStartError(Exception):
    """No process can be had, or it cannot import the function: the next would not fare better."""


class Isolated(Generic[Result]):
    """A function that runs in a child process, which starts with the first call.

    Calls follow each other; threads that want to call at once hold an `Isolated` each.

    Parameters
    ----------
    function : callable
        Of a module that can be imported, not of ``__main__``. Arguments, result and exceptions
        travel as pickles, both ways between processes of the same rights.
    timeout_s : float
        How long a call may take, in seconds, before its process is killed.
    """

    def __init__(self, function: Callable[..., Result], *, timeout_s: float) -> None:
        self._name = f"{function.__module__}:{function.__qualname__}"
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Connection | None = None
        self._closed = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the child; None before the first call and after a loss."""
        process = self._process
        return process.pid if process is not None else None

    def __call__(self, *args: Any) -> Result:
        """Call the function.

        Returns
        -------
        object
            What it returned.

        Raises
        ------
        CallLostError
            Its process died, took too long, or was closed meanwhile.
        CannotStartError
            There is no process to call it in.
        Exception
            What it raised: as it is where that is an error of ours or a built-in one, else as a
            RuntimeError that names it.
        """
        link = self._link or self._start()
        try:
            link.send(args)
            value, error = self._receive(link, self._timeout_s)
        except Exception as lost:  # also whatever a process in ruins may have sent
            raise CallLostError(self._end(lost)) from lost
        if error is not None:
            raise error
        result: Result = value
        return result

    def close(self) -> None:
        """End the child at once, from any thread; a call under way is lost. May be repeated."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_WITHIN_S)

    def _start(self) -> Connection:
        with self._lock:
            if self._closed:
                raise CallLostError("it was closed")
            ours, its = socket.socketpair()
            with its:
                try:
                    self._process = subprocess.Popen(
                        [sys.executable, "-c", _PROGRAM, self._name, *sys.path],
                        stdin=its.fileno(),
                        # a crashing library prints; the display of the run is no place for that
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                except (OSError, ValueError) as refused:
                    ours.close()
                    raise CannotStartError(f"no process could be started: {refused}") from refused
            self._link = link = Connection(ours.detach())
        try:
            _, error = self._receive(link, _START_WITHIN_S)
        except Exception as lost:
            reason = self._end(lost)
            # its death at the start is nobody's but its own, unless it was wanted
            kind = CallLostError if self._closed else CannotStartError
            raise kind(reason) from lost
        if error is not None:
            self._end(error)
            raise CannotStartError(str(error)) from error
        return link

    def _receive(self, link: Connection, timeout_s: float) -> tuple[Any, BaseException | None]:
        if not link.poll(timeout_s):
            raise TimeoutError(f"it took longer than {timeout_s:g} s")
        value, error = link.recv()
        return value, error

    def _end(self, cause: BaseException) -> str:
        """Let go of a child that is lost; return what became of it."""
        with self._lock:
            process, self._process = self._process, None
            link, self._link = self._link, None
        assert process is not None
        assert link is not None
        link.close()
        if isinstance(cause, TimeoutError):
            process.kill()
            process.wait()
            return str(cause)
        # One that died has closed its end a moment before it can be waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_WITHIN_S)
        process.kill()
        code = process.returncode
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"

    def __del__(self) -> None:
        """End the child of an object that nobody closed."""
        self.close()


def serve(name: str) -> None:
    """Be the child: answer calls of one function until the caller is gone; never returns.

    Parameters
    ----------
    name : str
        Module and function, with a colon between them. Calls come through file descriptor 0.
    """
    link = Connection(os.dup(0))
    os.nice(_NICENESS)
    with contextlib.suppress(OSError):  # where there is no /proc
        Path("/proc/self/oom_score_adj").write_text("1000")
    calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # The calls run beside the main thread, which stays at the socket to see the caller's end.
    threading.Thread(target=_answer, args=(link, name, calls), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            calls.put(link.recv())
    os._exit(0)


def _answer(link: Connection, name: str, calls: queue.SimpleQueue[Any]) -> None:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        link.send((None, _sendable(error)))
        return
    link.send((None, None))
    while True:
        args = calls.get()
        answer: tuple[Any, Exception | None]
        try:
            answer = (function(*args), None)
        except Exception as error:
            answer = (None, _sendable(error))
        link.send(answer)


def _sendable(error: Exception) -> Exception:
    if isinstance(error, MaskmillError) or type(error).__module__ == "builtins":
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
