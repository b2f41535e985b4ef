"""Claude as a researcher, by the Messages API: reads program, recipe and record, edits a working copy, hands it in.

    --researcher claude --model claude-opus-5-5 --effort high --max-cost 10

Each proposal is a conversation of its own, so its length does not grow with the night. Nothing that is remembered here
between two proposals is needed: all of it can be read from the record again, but for the sums of this run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from core.contract import Past, Proposal, Unavailable, View
from core.errors import UserError
from core.quoting import one_line
from researchers.account import CHARACTERS, KINDS, Account, Usage, dollars, price_of, price_table
from researchers.claude_api import REFUSED_WAIT, Call, Connection, Malformed, Reply
from researchers.claude_prompt import NEXT_TASK, TOOLS, first_message, mending, mending_elsewhere, system
from researchers.digest import digest
from researchers.tried import Tried
from researchers.workbench import ToolError, Workbench

MODEL = "claude-opus-5-5"
EFFORT = "high"  # of low, medium, high, xhigh, max: an answer every few minutes may take its time
EFFORTS = ("low", "medium", "high", "xhigh", "max")
MAX_COST = 10.0  # US dollars in one run
ATTEMPTS = 3  # at one idea: the first and two repairs
TIMEOUT = 180.0  # seconds in which nothing comes; the stream has a sign of life more often
ANSWER_TOKENS = 16_000  # thinking included
ANSWERS = 20  # in one conversation
USELESS = 3  # answers without a usable tool call in a row
MENDABLE = ("crash", "timeout")
RECENT = 3  # experiments among which a failed one is still worth mending
TYPICAL_ANSWERS, TYPICAL_OUTPUT = 4, 2500  # of one proposal, for the estimate

SpendIt = Callable[[Mapping[str, Any]], None]


class Claude:
    """`core.contract.Researcher`. Raises `UserError` when it is made without a key or with options that cannot be."""

    name = "claude"
    thinks_ahead = True  # it may be asked while an experiment runs

    def __init__(
        self,
        model: str = MODEL,
        effort: str | None = None,
        max_cost: float | None = MAX_COST,
        max_tokens: int | None = None,
        attempts: int = ATTEMPTS,
        timeout: float = TIMEOUT,
    ) -> None:
        if effort is not None and effort not in EFFORTS:
            raise UserError(f"effort {effort!r} is not known", f"use one of {', '.join(EFFORTS)}")
        price = price_of(model)
        takes_effort = price is not None and bool(price["effort"])
        self.account = Account(model, max_cost, max_tokens)
        self.attempts = attempts
        self.connection = Connection(self.account, timeout, effort or (EFFORT if takes_effort else None))
        self.tried = Tried()
        self._answered: set[int] = set()  # failed experiments that were mended or given up in this run

    def propose(self, view: View) -> Proposal:
        """Raises `Unavailable`; never `Exhausted`: a model has always one more idea."""
        failed = self._to_mend(view)
        proposal = _Conversation(self, view, failed).run()
        if failed is not None:
            self._answered.add(failed.number)
        return proposal

    def estimate(self, view: View) -> str:
        """What a proposal will cost, before any was asked for; one line."""
        characters = len(str(system(view))) + len(str(TOOLS)) + len(str(first_message(view, digest(view), NEXT_TASK)))
        prompt = int(characters / CHARACTERS)
        output = TYPICAL_ANSWERS * TYPICAL_OUTPUT
        first = dollars(self.account.model, Usage(output=output, cache_read=prompt * (TYPICAL_ANSWERS - 1),
                                                  cache_write=prompt, write_1h=prompt))  # fmt: skip
        size = f"{self.account.model}: some {prompt / 1000:.0f}k tokens of prompt, {TYPICAL_ANSWERS} answers a proposal"
        if first is None:
            return f"{size}; no price known, at most {self.account.max_tokens:,} tokens in this run"
        caps = [f"${self.account.max_cost:.2f}"] if self.account.max_cost is not None else []
        caps += [f"{self.account.max_tokens:,} tokens"] if self.account.max_tokens is not None else []
        cap = f"stops before {' or '.join(caps)} in this run" if caps else "no cap"
        return f"{size}, about ${first:.2f} for the first; {cap} (prices of {price_table()['date']})"

    def _to_mend(self, view: View) -> Past | None:
        """Our latest failed experiment that nobody has answered yet and that has attempts left."""
        by_number = {p.number: p for p in view.past}
        done = self._answered | {p.detail.get(key) for p in view.past for key in ("repairs", "gave_up")}
        for p in reversed(view.past[-RECENT:]):
            ours = p.detail.get("by") == self.name and p.status in MENDABLE and p.number not in done
            if ours and _attempt(p, by_number) < self.attempts:
                return p
        return None


def _attempt(p: Past, by_number: Mapping[int, Past]) -> int:
    """1 for the first try of an idea, 2 for its first repair, ..."""
    count, before = 1, p.detail.get("repairs")
    while isinstance(before, int) and before in by_number and count <= len(by_number):
        count, before = count + 1, by_number[before].detail.get("repairs")
    return count


@dataclass
class _Conversation:
    """From the task to an accepted proposal."""

    claude: Claude
    view: View
    failed: Past | None
    messages: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=lambda: {**dict.fromkeys(KINDS, 0), "answers": 0, "usd": 0.0})
    refused: int = 0  # proposals of the present idea that did not pass the checks
    gave_up: bool = False  # the repair

    def __post_init__(self) -> None:
        task, start = self._task()
        self.bench = Workbench(self.view, start)
        self.messages.append(first_message(self.view, digest(self.view), task))

    def _task(self) -> tuple[str, bytes]:
        """What is asked for, and what the working copy is at first. A failed file on an older base is not taken up
        again as it is: that would undo what was kept since."""
        if self.failed is None:
            return NEXT_TASK, self.view.best_source
        base = next((p for p in self.view.past if p.number == self.failed.parent), None)
        if base is not None and base.source == self.view.best_source:
            return mending(self.failed), self.failed.source
        return mending_elsewhere(base, self.failed), self.view.best_source

    def run(self) -> Proposal:
        useless = 0
        for _ in range(ANSWERS):
            if self.view.stopped():
                raise Unavailable("the run is over")
            try:
                reply = self._ask()
            except Malformed as broken:
                useless += 1
                self._tell(f"Your last answer could not be read ({broken}). Answer again, with valid tool calls.")
            else:
                accepted = self._take(reply)
                if accepted is not None:
                    return accepted
                useless = 0 if any(call.given is not None for call in reply.calls) else useless + 1
            if useless >= USELESS:
                raise Unavailable(f"claude gave {useless} answers in a row without a usable tool call", REFUSED_WAIT)
        raise Unavailable(f"claude handed nothing in within {ANSWERS} answers", REFUSED_WAIT)

    def _ask(self) -> Reply:
        return self.claude.connection.ask(
            system(self.view), TOOLS, self.messages, ANSWER_TOKENS, self._spend, self.view.stopped
        )

    def _spend(self, usage: Mapping[str, Any]) -> None:
        self.usage["answers"] += 1
        for kind in KINDS:
            self.usage[kind] += usage[kind]
        known = usage["usd"] is not None and self.usage["usd"] is not None
        self.usage["usd"] = self.usage["usd"] + usage["usd"] if known else None
        self.view.spend(usage)

    def _tell(self, words: str) -> None:
        self.messages.append({"role": "user", "content": [{"type": "text", "text": words}]})

    def _take(self, reply: Reply) -> Proposal | None:
        """Do what the answer asks for. A proposal that passes all checks ends the conversation."""
        if reply.stop == "refusal":
            why = f" ({reply.category})" if reply.category else ""
            raise Unavailable(f"claude declined to answer{why}", REFUSED_WAIT)
        while reply.content and reply.content[-1]["type"] not in ("text", "tool_use"):
            reply.content.pop()  # cut off while it thought: the API takes no message that ends so
        if reply.content:
            self.messages.append({"role": "assistant", "content": reply.content})
        if not reply.calls:
            cut = reply.stop in ("max_tokens", "model_context_window_exceeded")
            self._tell("Your answer was cut off: be shorter." if cut else "Use the tools: edit, then propose.")
            return None
        results: list[dict[str, Any]] = []
        for call in reply.calls:
            said, is_error = "", False
            try:
                done = self._do(call, cut_off=reply.stop == "max_tokens")
                if isinstance(done, Proposal):
                    return done
                said = done
            except ToolError as error:
                said, is_error = str(error), True
            results.append({"type": "tool_result", "tool_use_id": call.id, "content": said, "is_error": is_error})
        self.messages.append({"role": "user", "content": results})
        return None

    def _do(self, call: Call, cut_off: bool) -> str | Proposal:
        if call.given is None:
            why = "your answer was cut off" if cut_off else "the arguments were no valid JSON object"
            raise ToolError(f"{why}; nothing was done")
        if call.name == "view":
            return self.bench.look(call.given)
        if call.name == "edit":
            return self.bench.edit(call.given)
        if call.name == "start_over":
            return self._start_over()
        if call.name == "propose":
            return self._propose(call.given)
        raise ToolError(f"there is no tool {one_line(call.name, 40)!r}; there are view, edit, propose and start_over")

    def _start_over(self) -> str:
        self.bench.start_over()
        self.gave_up = self.failed is not None
        self.refused = 0
        return "the working copy is the best train.py again"

    def _propose(self, given: Mapping[str, Any]) -> Proposal:
        change, hypothesis, expected = (given.get(name) for name in ("change", "hypothesis", "expected"))
        if not isinstance(change, str) or not change.strip() or not isinstance(hypothesis, str):
            raise ToolError("`change` and `hypothesis` must be texts, `expected` a number; nothing was handed in")
        source = self.bench.candidate
        problem = self.claude.tried.before(self.view, source) or self.view.check(source)
        if problem:
            raise ToolError(self._refuse(problem))
        detail: dict[str, Any] = {
            "by": self.claude.name,
            "model": self.claude.account.model,
            "hypothesis": one_line(hypothesis, 1000),
            "expected": float(expected) if isinstance(expected, (int, float)) else None,
            "usage": dict(self.usage),
        }
        if self.failed is not None:
            detail["gave_up" if self.gave_up else "repairs"] = self.failed.number
        return Proposal(source, f"{one_line(change, 200)}: {one_line(hypothesis, 250)}", detail)

    def _refuse(self, problem: str) -> str:
        """What a refused proposal hears; after as many as an experiment has attempts the idea is given up."""
        self.refused += 1
        if self.refused < self.claude.attempts:
            return f"not handed in, nothing of the budget is spent: {problem}"
        self._start_over()
        return (
            f"not handed in: {problem}\nThis idea failed {self.claude.attempts} times and is given up. "
            "The working copy is the best train.py again: take another idea."
        )
