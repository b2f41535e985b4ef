"""run --notify URL: what happened in a night, posted as JSON while it goes on.

In the background, with a time limit; what fails is counted and told once at the end, without the URL: it may hold a
secret. It reaches neither ledger nor log.

One body for what people use: `text` is what Slack and Mattermost show, `content` what Discord shows, and the fields are
for programs. ntfy shows a body as it is, so that for it the text alone is sent, with the title in a header.
"""

from __future__ import annotations

import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from console.output import tidy
from console.rows import Row
from console.words import bpb, delta
from core.errors import UserError

TIMEOUT = 10.0  # seconds of one post
TRIES = 2  # of one post
WAITING = 100  # posts that may wait; beyond that the newest are dropped
LAST_WORDS = 15.0  # seconds that the end of a run waits for what is still to be posted
STALLED = 3.0  # times the usual length without a finished experiment after which a night counts as stalled
STALLED_LEAST = 1800.0  # seconds that this is at the least: a researcher may wait out a limit
LOOK = 1.0  # seconds between two looks


def checked(url: str) -> str:
    """The URL, if it is one of http or https. Raises `UserError` without repeating what may be a secret."""
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and not parts.username and (parts.port or 1) > 0
        good = parts.scheme in ("http", "https") and named and not any(c.isspace() for c in url)
    except ValueError:
        good = False
    if not good:
        raise UserError(
            "--notify needs a URL of http or https, without a user name in it",
            "give it whole: --notify https://ntfy.sh/my-topic",
        )
    return url


@contextmanager
def notifying(url: str | None, lab: str, each: float) -> Iterator[Notifier | None]:
    """A notifier for a run, None without a URL. A run that ends by an error is posted too."""
    notifier = Notifier(url, lab, each) if url is not None else None
    try:
        yield notifier
    except UserError as error:
        if notifier is not None:
            notifier.end(f"ended by an error: {error.fact}", {})
        raise


class Notifier:
    """Posts in a thread of its own. `each`: seconds that an experiment is expected to take."""

    def __init__(self, url: str, lab: str, each: float, stalled: float | None = None) -> None:
        self._url, self._lab = checked(url), lab
        self._patience = stalled if stalled is not None else max(STALLED_LEAST, STALLED * each)
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING)
        self._heard = time.monotonic()  # when the last experiment ended
        self._told_stall = False
        self._ended = threading.Event()
        self.failed = 0  # posts that did not arrive
        self.why = ""
        self._thread = threading.Thread(target=self._work, name="notify", daemon=True)
        self._thread.start()

    def experiment(self, found: Row) -> None:
        """An experiment was decided: keeps are posted."""
        self._heard, self._told_stall = time.monotonic(), False
        if found.kept:
            change = f", {delta(found.delta)}" if found.delta is not None else ""
            text = f"#{found.number} kept: {bpb(found.val_bpb)}{change}; {found.description}"
            self._put("keep", text, {"experiment": found.to_json()})

    def end(self, text: str, data: Mapping[str, Any]) -> str:
        """The run is over. Waits a little for what is to be posted; returns what to tell the user, "" for nothing."""
        self._put("end", text, data)
        self._ended.set()
        self._thread.join(LAST_WORDS)
        late = self._waiting.qsize()
        lost = self.failed + late
        return f"{lost} of the notifications did not arrive{f' ({self.why})' if self.why else ''}" if lost else ""

    def _put(self, event: str, text: str, data: Mapping[str, Any]) -> None:
        try:
            self._waiting.put_nowait({"event": event, "lab": self._lab, "text": text, "time": time.time(), **data})
        except queue.Full:
            self.failed += 1

    # --- the thread --------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            try:
                self._post(self._waiting.get(timeout=LOOK) or {})
            except queue.Empty:
                if self._ended.is_set():
                    return
                self._look()

    def _look(self) -> None:
        silent = time.monotonic() - self._heard
        if silent > self._patience and not self._told_stall:
            self._told_stall = True
            minutes = silent / 60
            self._put("stall", f"no experiment has finished for {minutes:.0f} minutes", {"seconds": silent})

    def _post(self, message: Mapping[str, Any]) -> None:
        request = _request(self._url, message)
        for left in reversed(range(TRIES)):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT):
                    return
            except (OSError, ValueError, HTTPException) as error:  # HTTP errors are OSErrors
                self.why = _reason(error)
            if left:
                time.sleep(LOOK)
        self.failed += 1


def _request(url: str, message: Mapping[str, Any]) -> urllib.request.Request:
    title = f"autoresearch {message['lab']}: {message['event']}"
    if "ntfy" in (urlsplit(url).hostname or ""):
        # ASCII only in a header; a lab's name is.
        body, headers = str(message["text"]).encode(), {"Title": title, "Content-Type": "text/plain; charset=utf-8"}
    else:
        words = f"{title}: {message['text']}"
        document = tidy({**message, "text": words, "content": words[:1900]})
        body, headers = json.dumps(document).encode(), {"Content-Type": "application/json"}
    return urllib.request.Request(url, data=body, headers={**headers, "User-Agent": "autoresearch"}, method="POST")


def _reason(error: Exception) -> str:
    """Why a post failed, without words of the server or of the URL."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    cause = getattr(error, "reason", error)
    return type(cause).__name__ if isinstance(cause, Exception) else "no connection"
