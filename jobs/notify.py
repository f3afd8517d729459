"""`--notify URL`: a webhook that hears how a run ends, and when too many videos fail.

The URL is a secret in itself (whoever has it can post), so it is never written anywhere: it is no
part of the stored configuration, and sentences name its host alone. Telling never holds up the run
and never fails it: it happens in a thread, once, with a time limit, and what goes wrong is a
warning.
"""

from __future__ import annotations

import json
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workers.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

URL_VARIABLE = "MASKMILL_NOTIFY_URL"
"""Environment variable for the URL, where a command line would show it to others."""
TIMEOUT_S = 10.0
"""The receiver has so long to accept a message."""
MIN_SETTLED = 20
"""A rate of quarantined videos means something from so many settled ones on."""


def check_url(url: str) -> None:
    """Refuse what is no webhook, without repeating it.

    Raises
    ------
    ConfigError
        It is not an http or https URL with a host.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and bool(host(url))
    except ValueError:
        is_usable = False
    if not is_usable:
        raise ConfigError("the URL to notify is none: give http:// or https:// and a host")


def host(url: str) -> str:
    """Return all of a URL that may be shown: its host and port.

    Examples
    --------
    >>> host("https://me:secret@hooks.example.org:8443/T0/B1/secret?token=secret")
    'hooks.example.org:8443'
    """
    parts = urllib.parse.urlsplit(url)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


@dataclass(slots=True)
class Notifier:
    """Tells a webhook what happens to a run.

    Attributes
    ----------
    url : str or None
        Where messages go; nowhere without. It shows in no `repr`.
    above_rate : float or None
        Share of quarantined videos above which one message is sent while the run goes on.
    warn : callable
        Takes a sentence about a message that did not arrive; called from `flush` and `send`.
    """

    url: str | None = field(repr=False)
    above_rate: float | None
    warn: Callable[[str], None]
    _threads: list[threading.Thread] = field(default_factory=list)
    _failures: list[str] = field(default_factory=list)
    _told_rate: bool = False

    def send(self, event: str, text: str, facts: Mapping[str, Any]) -> None:
        """Post one message, in a thread.

        Parameters
        ----------
        event : str
            ``finished``, ``stopped``, ``failed`` or ``quarantine_rate``.
        text : str
            One sentence for people; chat services show this key.
        facts : Mapping
            JSON-serialisable, what programs read.
        """
        self._report()
        if self.url is None:
            return
        body = json.dumps({"text": text, "event": event, **facts}).encode()
        thread = threading.Thread(target=self._post, args=(body,), name="notify", daemon=True)
        self._threads.append(thread)
        thread.start()

    def settled(self, num_committed: int, num_quarantined: int, facts: Mapping[str, Any]) -> None:
        """Look at the rate of quarantined videos; above the limit, tell it once."""
        total = num_committed + num_quarantined
        if self.url is None or self.above_rate is None or self._told_rate or total < MIN_SETTLED:
            return
        if num_quarantined > self.above_rate * total:
            self._told_rate = True
            text = (
                f"maskmill run {facts['run_id']}: {num_quarantined} of {total} videos settled so "
                f"far are in quarantine, more than {self.above_rate:.0%}; the run goes on"
            )
            self.send("quarantine_rate", text, facts)

    def flush(self) -> None:
        """Wait until every message has arrived or failed, a few seconds at most."""
        for thread in self._threads:
            thread.join(TIMEOUT_S + 1)
        if any(thread.is_alive() for thread in self._threads):
            self._failures.append("no answer in time")
        self._threads.clear()
        self._report()

    def _post(self, body: bytes) -> None:
        assert self.url is not None
        request = urllib.request.Request(
            self.url,
            data=body,
            headers={"Content-Type": "application/json", "User-Agent": "maskmill"},
            method="POST",
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                answer.read(1)
        except urllib.error.HTTPError as error:
            self._failures.append(f"it answered {error.code}")
        except TimeoutError:
            self._failures.append("no answer in time")
        except Exception as error:
            # Only the kind: messages of network libraries repeat the URL.
            reason = getattr(error, "reason", error)
            self._failures.append(f"it cannot be reached ({type(reason).__name__})")

    def _report(self) -> None:
        failures, self._failures = self._failures, []
        for reason in failures:
            assert self.url is not None
            self.warn(f"the message to the notify URL at {host(self.url)} did not arrive: {reason}")


def notify_url(configured: str | None) -> str | None:
    """Return the URL that was given, else that of the environment, else None.

    Raises
    ------
    ConfigError
        It is no http or https URL.
    """
    url = configured or os.environ.get(URL_VARIABLE) or None
    if url is not None:
        check_url(url)
    return url
