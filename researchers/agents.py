"""The coding agents that are known by name, and how to read what they say.

Flags are those of the agents' own help, read in November 2026: Claude Code 2.1.197 (also run), Codex 0.169.0, Gemini
CLI 0.61.0, which takes its task from standard input (https://geminicli.com/docs/cli/headless); those of aider are from
https://aider.chat/docs/scripting.html.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

Usage = dict[str, Any]  # as `View.spend` takes it


@dataclass(frozen=True)
class Answer:
    """What an agent printed, read: its last words, whether it calls itself failed, and what it used."""

    text: str = ""
    failed: bool = False
    usage: list[Usage] = field(default_factory=list)  # `usd` at list prices, None where not told


@dataclass(frozen=True)
class Agent:
    """A preset."""

    name: str
    command: str
    install: str
    login: str  # what to do when it is not logged in
    passed: tuple[str, ...] = ()  # variables that it gets where they are set
    set: Mapping[str, str] = field(default_factory=dict)  # variables that it always gets
    keys: tuple[str, ...] = ()  # variables that make it bill by the token
    litter: tuple[str, ...] = ()  # beginnings of names of files that it leaves behind by itself
    read: Callable[[str], Answer] = lambda out: Answer(out)


# --- reading what they print ---------------------------------------------------------------------


def _documents(out: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in the output: the whole of it, or line by line."""
    for piece in (out, *out.splitlines()):
        if piece.lstrip().startswith("{"):
            try:
                found = json.loads(piece)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found
                if piece is out:
                    return


def read_claude_code(out: str) -> Answer:
    """`--output-format json`: one object of type "result"."""
    for said in _documents(out):
        if said.get("type") == "result":
            usage = [
                {
                    "model": model,
                    "input_tokens": used.get("inputTokens", 0),
                    "output_tokens": used.get("outputTokens", 0),
                    "cache_read_tokens": used.get("cacheReadInputTokens", 0),
                    "cache_write_tokens": used.get("cacheCreationInputTokens", 0),
                    "usd": used.get("costUSD"),
                }
                for model, used in (said.get("modelUsage") or {}).items()
            ]
            return Answer(str(said.get("result") or ""), bool(said.get("is_error")), usage)
    return Answer(out)


def read_codex(out: str) -> Answer:
    """`--json`: one event a line."""
    text, failed, usage = "", False, []
    for event in _documents(out):
        kind, item = event.get("type"), event.get("item") or {}
        if kind == "item.completed" and item.get("type") == "agent_message":
            text = str(item.get("text") or "")
        elif kind in ("turn.failed", "error"):
            failed, text = True, json.dumps(event.get("error") or event.get("message") or "")
        elif kind == "turn.completed" and isinstance(event.get("usage"), dict):
            used, cached = event["usage"], int(event["usage"].get("cached_input_tokens") or 0)
            usage.append({
                "model": "codex", "input_tokens": max(0, int(used.get("input_tokens") or 0) - cached),
                "output_tokens": int(used.get("output_tokens") or 0), "cache_read_tokens": cached, "usd": None,
            })  # fmt: skip
    return Answer(text or out, failed, usage)


def read_gemini(out: str) -> Answer:
    """`--output-format json`: one object with `response`, `stats` and, when it failed, `error`."""
    for said in _documents(out):
        if "response" in said or "error" in said:
            usage = []
            for model, used in ((said.get("stats") or {}).get("models") or {}).items():
                tokens = used.get("tokens") or {}
                cached = int(tokens.get("cached") or 0)
                written = int(tokens.get("candidates") or 0) + int(tokens.get("thoughts") or 0)
                usage.append({
                    "model": model, "input_tokens": max(0, int(tokens.get("prompt") or 0) - cached),
                    "output_tokens": written, "cache_read_tokens": cached, "usd": None,
                })  # fmt: skip
            error = said.get("error")
            return Answer(json.dumps(error) if error else str(said.get("response") or ""), bool(error), usage)
    return Answer(out)


AGENTS: Mapping[str, Agent] = {
    agent.name: agent
    for agent in (
        Agent(
            "claude-code",
            "claude -p --output-format json --permission-mode acceptEdits --no-session-persistence "
            "--strict-mcp-config --disallowedTools Bash,WebFetch,WebSearch",
            install="npm install -g @anthropic-ai/claude-code",
            login="log in once with `claude`, or use an API key: --researcher claude",
            # Not ANTHROPIC_API_KEY: with it Claude Code bills by the token instead of using the subscription.
            passed=("CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CONFIG_DIR", "ANTHROPIC_BASE_URL", "ANTHROPIC_MODEL"),
            set={"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"},
            keys=("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"),
            litter=(".claude",),
            read=read_claude_code,
        ),
        Agent(
            "codex",
            "codex exec --json --sandbox workspace-write --skip-git-repo-check -",
            install="npm install -g @openai/codex",
            login="log in once with `codex login`, or set CODEX_API_KEY",
            passed=("CODEX_HOME", "CODEX_API_KEY", "OPENAI_BASE_URL"),
            keys=("CODEX_API_KEY",),
            litter=(".codex",),
            read=read_codex,
        ),
        Agent(
            "aider",
            "aider --message-file {prompt_file} --yes-always --no-git --no-stream --no-pretty --no-check-update "
            "--read program.md --read digest.md --file train.py --file idea.txt",
            install="python -m pip install aider-install; aider-install",
            login="set the key of your provider, as in OPENAI_API_KEY",
            passed=("OPENAI_API_KEY", "OPENAI_API_BASE", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "DEEPSEEK_API_KEY",
                    "OPENROUTER_API_KEY", "OLLAMA_API_BASE", "AIDER_MODEL"),
            keys=("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "DEEPSEEK_API_KEY", "OPENROUTER_API_KEY"),
            litter=(".aider",),
        ),
        Agent(
            "gemini",
            # The task comes on standard input: npm's gemini.cmd would end a --prompt at its first line.
            "gemini --output-format json --approval-mode auto_edit --skip-trust",
            install="npm install -g @google/gemini-cli",
            login="log in once with `gemini`, or set GEMINI_API_KEY",
            passed=("GEMINI_API_KEY", "GOOGLE_API_KEY", "GOOGLE_CLOUD_PROJECT", "GOOGLE_CLOUD_LOCATION",
                    "GOOGLE_GENAI_USE_VERTEXAI", "GEMINI_MODEL"),
            keys=("GEMINI_API_KEY", "GOOGLE_API_KEY"),
            litter=(".gemini",),
            read=read_gemini,
        ),
    )
}  # fmt: skip


# --- limits --------------------------------------------------------------------------------------

_STATUS = r"(?:http|status|code|error|rejected)\W{0,3}(?:code\W{0,2})?"  # before a number that is one of HTTP's
_LIMIT = re.compile(
    r"(usage|session|weekly|(?<!learning[ _-])rate|daily|5-hour|opus|sonnet)[ _-]?limit|hit your( \w+)? limit"
    rf"|too many requests|overloaded|quota|resource.?exhausted|{_STATUS}(429|529)\b",
    re.IGNORECASE,
)
_LOGIN = re.compile(
    r"invalid (api|x-api)[ -]?key|/login|not logged in|log ?in again|unauthori[sz]ed|authentication[_ ]error"
    rf"|{_STATUS}401\b|credit balance|oauth token|(api )?key (is )?(missing|required|not set)",
    re.IGNORECASE,
)
_EPOCH = re.compile(r"limit reached\|(\d{10})\b")
_AT = re.compile(
    r"resets?\s+(?:on\s+|at\s+)?(?:(?P<month>[A-Z][a-z]{2})[a-z]*\s+(?P<day>\d{1,2}),?\s+(?:at\s+)?)?"
    r"(?P<hour>\d{1,2})(?::(?P<minute>\d{2}))?\s*(?P<half>am|pm)?(?!\w)(?:\s*\((?P<zone>[\w/+-]+)\))?",
    re.IGNORECASE,
)
_IN = re.compile(
    r"(?:(?:try again|retry|resets?|reset)\s*(?:in|after)|retry[-_ ]after)['\"]?[:=]?\s*"
    r"(?P<span>(?:\d+(?:\.\d+)?\s*(?:days?|d|hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s)?[\s,]*(?:and\s+)?)+)",
    re.IGNORECASE,
)
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([dhms]?)", re.IGNORECASE)
_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "": 1.0}
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


def is_limit(text: str) -> bool:
    """Whether an agent's complaint is about a limit that passes by itself."""
    return bool(_LIMIT.search(text))


def is_login(text: str) -> bool:
    """Whether it is about a login, a key or an empty account: only a person can mend it."""
    return bool(_LOGIN.search(text))


def retry_after(text: str, now: datetime | None = None) -> float | None:
    """Seconds from `now` (aware; default: the present) until the limit that `text` tells of is over; None: not told.

    >>> at = datetime(2026, 11, 25, 22, 0, tzinfo=timezone.utc)
    >>> retry_after("You've hit your limit · resets 3am (UTC)", at)
    18000.0
    """
    now = now or datetime.now().astimezone()
    if found := _EPOCH.search(text):
        return max(0.0, int(found[1]) - now.timestamp())
    if found := _IN.search(text):
        return sum(float(number) * _UNITS[unit.lower()] for number, unit in _PART.findall(found["span"]))
    if found := _AT.search(text):
        return _until(found, now)
    return None


def _until(found: re.Match[str], now: datetime) -> float | None:
    """Seconds until the next such time of day."""
    try:
        here = now.astimezone(ZoneInfo(found["zone"])) if found["zone"] else now
    except (ZoneInfoNotFoundError, ValueError):
        here = now
    hour, half = int(found["hour"]), (found["half"] or "").lower()
    if half:
        hour = hour % 12 + (12 if half == "pm" else 0)
    month = (found["month"] or "").lower()
    try:
        then = here.replace(hour=hour, minute=int(found["minute"] or 0), second=0, microsecond=0)
        if month in _MONTHS:
            then = then.replace(month=_MONTHS.index(month) + 1, day=int(found["day"]))
    except ValueError:  # no such time
        return None
    if then <= here:
        then = then.replace(year=then.year + 1) if month in _MONTHS else then + timedelta(days=1)
    return (then.astimezone(timezone.utc) - here.astimezone(timezone.utc)).total_seconds()
