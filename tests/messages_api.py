"""A server that speaks the Messages API over real HTTP, streaming included, and answers by a script.

    with MessagesApi(answer) as api:
        ... ANTHROPIC_BASE_URL=api.url, any key ...
        api.requests                 every request that came: path, headers, body

`answer(request)` is called for each POST to /v1/messages and returns what to send: `Answer`, `Fault` or `Hang`. It is
given the request with all earlier ones counted, so a script may follow the conversation or its own count;
`script([...])` plays a list and repeats its last entry. Counts tokens (four characters each) and bills with a prompt
cache, as the real service does: what lies up to a `cache_control` mark is written once and read after that.

By hand, for any client (Claude Code as well): `python tests/messages_api.py` prints the address and answers "ok".
"""

from __future__ import annotations

import hashlib
import itertools
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CHARACTERS_PER_TOKEN = 4
PIECE = 40  # characters in one event of a stream


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    number: int  # of the POSTs to /v1/messages, from 1
    path: str
    headers: Mapping[str, str]  # names in lower case
    body: Mapping[str, Any]

    @property
    def messages(self) -> list[dict[str, Any]]:
        return list(self.body.get("messages", []))

    def text(self) -> str:
        """All that a model would read: tools, system prompt and messages, as JSON."""
        return json.dumps([self.body.get(part) for part in ("tools", "system", "messages")])

    def results(self) -> list[dict[str, Any]]:
        """The tool results of the last message."""
        content = self.messages[-1]["content"] if self.messages else []
        return [b for b in content if isinstance(b, dict) and b.get("type") == "tool_result"]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


_calls = itertools.count(1)


def tool(name: str, given: Mapping[str, Any] | str, call: str | None = None) -> dict[str, Any]:
    """A tool call. `given` as a string is sent as it is, valid JSON or not."""
    return {"type": "tool_use", "id": call or f"toolu_{next(_calls):06d}", "name": name, "input": given}


@dataclass(frozen=True)
class Answer:
    """Content blocks of `text` and `tool`. `stop` as the API names it; by default what the blocks imply."""

    content: Sequence[Mapping[str, Any]]
    stop: str | None = None
    output_tokens: int | None = None  # what is billed; by default what was sent
    seconds: float = 0.0  # of thinking before anything comes
    cut_after: int | None = None  # events after which the connection is closed
    pause: float = 0.0  # seconds between two events of a stream

    def reason(self) -> str:
        called = any(b["type"] == "tool_use" for b in self.content)
        return self.stop or ("tool_use" if called else "end_turn")


@dataclass(frozen=True)
class Fault:
    """An HTTP error as the API sends it."""

    status: int
    kind: str = "api_error"
    message: str = "scripted"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Hang:
    """Nothing for so long, then the connection is reset."""

    seconds: float = 3600.0


Reply = Answer | Fault | Hang
Script = Callable[[Asked], Reply]


def script(replies: Sequence[Reply | Script]) -> Script:
    """One after another; the last one again and again."""
    count = itertools.count()
    lock = threading.Lock()

    def answer(asked: Asked) -> Reply:
        with lock:
            reply = replies[min(next(count), len(replies) - 1)]
        return reply(asked) if callable(reply) else reply

    return answer


class MessagesApi:
    """The server, in threads of this process, on a free port of the loopback address."""

    def __init__(self, answer: Script, port: int = 0) -> None:
        self.answer = answer
        self.requests: list[Asked] = []
        self.counted: list[Asked] = []  # requests to count_tokens
        self.billed: list[dict[str, int]] = []
        self.errors: list[BaseException] = []  # of the script: a test looks that there are none
        self._lock = threading.Lock()
        self._cached: set[str] = set()
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.api = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> MessagesApi:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def reply(self, path: str, headers: Mapping[str, str], body: Mapping[str, Any]) -> tuple[Asked, Reply]:
        with self._lock:
            asked = Asked(len(self.requests) + 1, path, headers, body)
            self.requests.append(asked)
        try:
            return asked, self.answer(asked)
        except Exception as error:  # noqa: BLE001 - the test that wrote the script has to see it
            self.errors.append(error)
            return asked, Fault(500, message=f"the script raised {error!r}", headers={"x-should-retry": "false"})

    def bill(self, asked: Asked, answer: Answer) -> dict[str, int]:
        """Usage of one answer. The cached prefix is what lies up to each `cache_control` mark."""
        read = written = 0
        with self._lock:
            for prefix in _marked(asked.body):
                name = hashlib.sha256(f"{asked.body.get('model')}{prefix}".encode()).hexdigest()
                size = _tokens(prefix)
                if name in self._cached:
                    read = max(read, size)
                else:
                    self._cached.add(name)
                    written = max(written, size)
        written = max(0, written - read)
        sent = json.dumps([dict(block) for block in answer.content])
        usage = {
            "input_tokens": max(1, count_tokens(asked.body) - read - written),
            "cache_creation_input_tokens": written,
            "cache_read_input_tokens": read,
            "output_tokens": answer.output_tokens if answer.output_tokens is not None else _tokens(sent),
        }
        self.billed.append(usage)
        return usage


def count_tokens(body: Mapping[str, Any]) -> int:
    return _tokens(json.dumps([body.get(part) for part in ("tools", "system", "messages")]))


def _tokens(words: str) -> int:
    return max(1, len(words) // CHARACTERS_PER_TOKEN)


def _marked(body: Mapping[str, Any]) -> Iterator[str]:
    """All that lies up to and with each `cache_control` mark, in the order of the API: tools, system, messages."""
    blocks: list[Any] = list(body.get("tools") or [])
    system = body.get("system") or []
    blocks += [{"type": "text", "text": system}] if isinstance(system, str) else list(system)
    for message in body.get("messages", []):
        content = message["content"]
        blocks += [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    seen = ""
    for block in blocks:
        plain = {k: v for k, v in block.items() if k != "cache_control"}
        seen += json.dumps(plain, sort_keys=True)
        if "cache_control" in block:
            yield seen


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    api: MessagesApi

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        if self.path.split("?")[0] == "/v1/models":
            self._json(200, {"data": [], "has_more": False, "first_id": None, "last_id": None})
        else:
            self._fault(Fault(404, "not_found_error", f"no such path: {self.path}"))

    def do_POST(self) -> None:
        size = int(self.headers.get("content-length") or 0)
        raw = self.rfile.read(size)
        path = self.path.split("?")[0]
        headers = {name.lower(): value for name, value in self.headers.items()}
        if path not in ("/v1/messages", "/v1/messages/count_tokens"):
            self._fault(Fault(404, "not_found_error", f"no such path: {self.path}"))
            return
        try:
            body = json.loads(raw)
        except ValueError:
            self._fault(Fault(400, "invalid_request_error", "the body is not JSON"))
            return
        if not (headers.get("x-api-key") or headers.get("authorization")):
            self._fault(Fault(401, "authentication_error", "x-api-key header is required"))
        elif path.endswith("count_tokens"):
            self.server.api.counted.append(Asked(0, self.path, headers, body))
            self._json(200, {"input_tokens": count_tokens(body)})
        elif problem := _problem(body):
            self._fault(Fault(400, "invalid_request_error", problem))
        else:
            self._answer(*self.server.api.reply(self.path, headers, body))

    def _answer(self, asked: Asked, reply: Reply) -> None:
        if isinstance(reply, Hang):
            self.server.api.closing.wait(reply.seconds)
            self._reset()
        elif isinstance(reply, Fault):
            self._fault(reply)
        else:
            self.server.api.closing.wait(reply.seconds)
            usage = self.server.api.bill(asked, reply)
            if asked.body.get("stream"):
                self._stream(asked, reply, usage)
            else:
                self._json(200, _message(asked, reply, usage))

    def _fault(self, fault: Fault) -> None:
        error = {"type": fault.kind, "message": fault.message}
        self._json(fault.status, {"type": "error", "error": error, "request_id": "req_scripted"}, fault.headers)

    def _json(self, status: int, document: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.send_header("request-id", "req_scripted")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, asked: Asked, answer: Answer, usage: Mapping[str, int]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.send_header("request-id", "req_scripted")
        self.end_headers()
        for count, (name, event) in enumerate(_events(asked, answer, usage)):
            if answer.cut_after is not None and count >= answer.cut_after:
                self.close_connection = True
                return
            data = f"event: {name}\ndata: {json.dumps(event)}\n\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
            self.server.api.closing.wait(answer.pause)
        self.wfile.write(b"0\r\n\r\n")

    def _reset(self) -> None:
        """Close with RST, as a broken network does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def _problem(body: Mapping[str, Any]) -> str:
    """What the real service refuses about a conversation: a client that gets this wrong must not pass here."""
    messages = body.get("messages")
    if not isinstance(body.get("model"), str) or not isinstance(body.get("max_tokens"), int) or not messages:
        return "model, max_tokens and messages are required"
    open_calls: set[str] = set()
    for k, message in enumerate(messages):
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not blocks or any(b.get("type") == "text" and not b["text"].strip() for b in blocks):
            return f"messages.{k}: text content blocks must be non-empty"
        answered = {b["tool_use_id"] for b in blocks if b.get("type") == "tool_result"}
        if open_calls - answered:
            return f"messages.{k}: `tool_use` ids were found without `tool_result` blocks: {sorted(open_calls)}"
        if answered - open_calls:
            return f"messages.{k}: unexpected `tool_use_id` in `tool_result` blocks: {sorted(answered - open_calls)}"
        if any(b.get("type") == "tool_use" and not isinstance(b.get("input"), dict) for b in blocks):
            return f"messages.{k}: tool_use.input: Input should be a valid dictionary"
        open_calls = {b["id"] for b in blocks if b.get("type") == "tool_use"}
    return f"the last message left calls open: {sorted(open_calls)}" if open_calls else ""


def _message(asked: Asked, answer: Answer, usage: Mapping[str, int]) -> dict[str, Any]:
    content = [dict(block) for block in answer.content]
    return _head(asked) | {
        "content": content,
        "stop_reason": answer.reason(),
        "usage": dict(usage),
        "stop_sequence": None,
    }


def _head(asked: Asked) -> dict[str, Any]:
    return {
        "id": f"msg_{asked.number:06d}",
        "type": "message",
        "role": "assistant",
        "model": asked.body["model"],
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _events(asked: Asked, answer: Answer, usage: Mapping[str, int]) -> Iterator[tuple[str, dict[str, Any]]]:
    begin = {**usage, "output_tokens": 1}
    yield "message_start", {"type": "message_start", "message": _head(asked) | {"usage": begin}}
    yield "ping", {"type": "ping"}
    for index, block in enumerate(answer.content):
        yield from _block(index, block)
    delta = {"stop_reason": answer.reason(), "stop_sequence": None}
    yield "message_delta", {"type": "message_delta", "delta": delta, "usage": dict(usage)}
    yield "message_stop", {"type": "message_stop"}


def _block(index: int, block: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    is_call = block["type"] == "tool_use"
    empty = {**block, "input": {}} if is_call else {"type": "text", "text": ""}
    given = block.get("input")
    whole = (given if isinstance(given, str) else json.dumps(given)) if is_call else str(block["text"])
    yield "content_block_start", {"type": "content_block_start", "index": index, "content_block": empty}
    for start in range(0, len(whole), PIECE):
        piece = whole[start : start + PIECE]
        delta = (
            {"type": "input_json_delta", "partial_json": piece} if is_call else {"type": "text_delta", "text": piece}
        )
        yield "content_block_delta", {"type": "content_block_delta", "index": index, "delta": delta}
    yield "content_block_stop", {"type": "content_block_stop", "index": index}


if __name__ == "__main__":
    with MessagesApi(lambda asked: Answer([text("ok")])) as server:
        print(server.url, flush=True)
        while True:
            time.sleep(60)
