"""One answer of the Messages API: asked for by stream, retried as the SDK does, every fault told as `Unavailable`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx2

from core.commands import setting
from core.contract import Unavailable, never
from core.errors import UserError
from core.quoting import one_line
from researchers.account import CHARACTERS, Account, Usage

RETRIES = 4  # of the SDK, with its backoff and jitter
BAD_REQUESTS = 3  # in a row, after which another conversation will fare no better
PATIENCE = 20.0  # seconds of `retry-after` that are waited out here; longer ones are the loop's
WAIT = 60.0  # seconds until it is worth asking again, where nobody said
REFUSED_WAIT = 30.0
PERSON = "a person has to look"
KEYS = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
TRANSIENT = ("overloaded_error", "rate_limit_error", "api_error", "timeout_error")
NEXT = {
    "authentication_error": "the key is not accepted; set a valid ANTHROPIC_API_KEY",
    "permission_error": "the key may not do this; see the console of the account",
    "billing_error": "the account has no credit; add some",
    "not_found_error": "the model or the address is not known; see --model and ANTHROPIC_BASE_URL",
}


@dataclass(frozen=True)
class Call:
    """A tool call. `given` is None when its arguments were no whole JSON object."""

    id: str
    name: str
    given: Mapping[str, Any] | None


@dataclass(frozen=True)
class Reply:
    """`content` as it goes back with the next request."""

    content: list[dict[str, Any]]
    calls: list[Call]
    stop: str
    usage: Usage
    category: str = ""  # of a refusal


class Malformed(Exception):
    """What came was no message: a tool call that no parser reads."""


@dataclass
class _Seen:
    """What a stream has shown so far, for the bill of one that breaks off."""

    usage: Usage | None = None
    characters: int = 0
    whole: bool = False
    raw: dict[int, str] = field(default_factory=dict)  # index of a block -> its arguments as they came

    def partial(self) -> Usage | None:
        if self.usage is None:
            return None
        u = self.usage
        output = u.output if self.whole else max(u.output, int(self.characters / CHARACTERS))
        return Usage(u.input, output, u.cache_read, u.cache_write, u.write_1h)


class Connection:
    """A client, its key from the environment. `spend` is told what each answer took, broken ones too."""

    def __init__(self, account: Account, timeout: float, effort: str | None) -> None:
        self.account = account
        self.effort = effort
        self.secrets = [os.environ[name] for name in KEYS if os.environ.get(name)]
        if not self.secrets:
            raise UserError(
                "researcher claude needs a key, and ANTHROPIC_API_KEY is not set",
                f"set it (a key from https://platform.claude.com): {setting(KEYS[0], '...')}; or use a Claude "
                "subscription: --researcher claude-code",
            )
        self._characters = 0
        self._bad = 0  # requests in a row that the API called bad
        self._client = anthropic.Anthropic(
            max_retries=RETRIES,
            timeout=httpx2.Timeout(timeout, connect=min(10.0, timeout)),
            middleware=[self._each_attempt],
        )

    def ask(
        self,
        system: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        messages: Sequence[Mapping[str, Any]],
        wanted: int,
        spend: Callable[[Mapping[str, Any]], None],
        stopped: Callable[[], bool] = never,
    ) -> Reply:
        """Raises `Unavailable`, and `Malformed` for an answer that cannot be read. Once `stopped` says so the answer is
        not waited for any longer; what it has taken by then is billed, and so told to `spend`."""
        self._characters = sum(len(json.dumps(part)) for part in (system, tools, messages))
        allowed = self.account.reserve(self._characters, wanted)
        request: dict[str, Any] = {
            "model": self.account.model,
            "max_tokens": allowed,
            "system": list(system),
            "tools": list(tools),
            "messages": list(messages),
        }
        if self.effort:
            request["output_config"] = {"effort": self.effort}
        seen = _Seen()
        try:
            message = self._stream(request, seen, stopped)
            seen.usage = usage_of(message.usage)
            seen.whole = True
            self._bad = 0
            return _reply(message, seen.raw, seen.usage)
        except ValueError as error:
            raise Malformed(one_line(self._clean(str(error)))) from None
        except (anthropic.APIError, httpx2.HTTPError) as error:
            raise self._unavailable(error) from None
        finally:
            self.account.release()
            taken = seen.partial()
            if taken is not None:
                spend(self.account.settle(taken))
                if not seen.whole:  # thinking is billed and may not be shown: for the caps, all that was allowed
                    self.account.lost(output=allowed - taken.output)

    def _stream(self, request: Mapping[str, Any], seen: _Seen, stopped: Callable[[], bool]) -> Any:
        with self._client.messages.stream(**request) as stream:
            for event in stream:
                if event.type == "message_start":
                    seen.usage = usage_of(event.message.usage)
                elif event.type == "content_block_start":
                    seen.raw.setdefault(event.index, "")
                elif event.type == "content_block_delta":
                    delta = event.delta
                    piece = getattr(delta, "partial_json", None) or getattr(delta, "text", None) or ""
                    seen.characters += len(piece) + len(getattr(delta, "thinking", None) or "")
                    if delta.type == "input_json_delta":
                        seen.raw[event.index] += delta.partial_json
                if stopped():  # last, so that what has come is on the bill
                    raise Unavailable("the run is over")
            return stream.get_final_message()

    def _each_attempt(self, request: Any, call_next: Any) -> Any:
        """Runs within the SDK's retries. A long `retry-after` is not slept out in there, where nobody can stop it."""
        try:
            response = call_next(request)
        except anthropic.APIConnectionError:
            self.account.lost(prompt=self._characters)
            raise
        if response.status_code in (429, 503, 529):
            wait = _seconds(response.headers)
            if wait is not None and wait > PATIENCE:
                raise Unavailable(f"the API asks to wait {wait:.0f} s (HTTP {response.status_code})", wait)
        return response

    # --- faults --------------------------------------------------------------------------------------

    def _unavailable(self, error: Exception) -> Unavailable:
        """What an error means for the loop: wait, or nothing to hope for until a person has acted."""
        if not isinstance(error, anthropic.APIStatusError):
            kind = "did not answer in time" if "imeout" in type(error).__name__ else "cannot be reached"
            return Unavailable(f"the API {kind} ({self._clean(str(error))})", WAIT)
        kind = str(error.type or "")
        said = self._clean(str(error.api_message or error.message))
        status = error.status_code
        if _no_credit(status, said):
            kind = "billing_error"
        if kind in TRANSIENT or status in (408, 409, 429) or status >= 500:
            return Unavailable(f"the API is busy ({kind or status}: {said})", _seconds(error.response.headers) or WAIT)
        if status in (400, 413) and kind in ("invalid_request_error", "request_too_large", ""):
            self._bad += 1  # of this conversation, maybe: a filter, a length; another one begins anew
            return Unavailable(f"the API refuses ({kind or status}: {said})", WAIT, final=self._bad >= BAD_REQUESTS)
        action = NEXT.get(kind, PERSON)
        return Unavailable(f"the API refuses ({kind or status}: {said}); {action}", final=True)

    def _clean(self, text: str) -> str:
        """Without any key, whoever put it there, and on one line."""
        for secret in self.secrets:
            text = text.replace(secret, "(key)")
        return one_line(text, 300)


def _no_credit(status: int, said: str) -> bool:
    return status == 402 or (status in (400, 403) and "credit balance" in said.lower())


def _seconds(headers: Mapping[str, str]) -> float | None:
    """`retry-after` in seconds, where it says so."""
    try:
        wait = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return wait if 0 <= wait < 30 * 86400 else None


# --- reading answers -----------------------------------------------------------------------------------


def usage_of(usage: Any) -> Usage:
    written = int(usage.cache_creation_input_tokens or 0)
    creation = usage.cache_creation
    return Usage(
        input=int(usage.input_tokens or 0),
        output=int(usage.output_tokens or 0),
        cache_read=int(usage.cache_read_input_tokens or 0),
        cache_write=written,
        write_1h=min(written, int(getattr(creation, "ephemeral_1h_input_tokens", 0) or 0)) if creation else 0,
    )


def _reply(message: Any, raw: Mapping[int, str], usage: Usage) -> Reply:
    content, calls = [], []
    for index, block in enumerate(message.content):
        if block.type == "text":
            if block.text.strip():  # the API takes no empty text back
                content.append({"type": "text", "text": block.text})
        elif block.type == "tool_use":
            given = block.input if isinstance(block.input, dict) else {}
            content.append({"type": "tool_use", "id": block.id, "name": block.name, "input": given})
            calls.append(Call(block.id, block.name, _arguments(raw.get(index, ""), given)))
        else:  # thinking has to go back as it came
            content.append(block.model_dump(exclude_none=True))
    category = str(getattr(getattr(message, "stop_details", None), "category", None) or "")
    return Reply(content, calls, str(message.stop_reason or ""), usage, category)


def _arguments(raw: str, parsed: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The SDK reads what was cut off as far as it goes: half an edit, which must not be made."""
    if not raw:
        return parsed
    try:
        given = json.loads(raw)
    except ValueError:
        return None
    return given if isinstance(given, dict) else None
