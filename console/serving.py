"""mcp: the verbs of a lab as tools of an MCP server, over standard input and output.

Every tool but two, which read a file, is the verb of the same name, run as a process with --json: one way to say what a
lab knows. Nothing takes longer than a client waits: what is long is started, and waited for in pieces.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console import places
from core.commands import pip_install
from core.errors import UserError

if TYPE_CHECKING:
    from mcp.server import MCPServer

CALL = 45.0  # seconds that no call lasts
WAIT = 30.0  # seconds of one `wait`, so that starting and telling fit in too
DIFF = 60_000  # characters
INSTALL = f"in the clone of this repository: {pip_install('-e', '.[mcp]')}"
INSTRUCTIONS = """\
A lab: one file, train.py, is researched; a fixed training budget and one number, val_bpb (lower is better), judge it.
Call `program` first and follow it. Edit train.py in the lab's folder, hand it in by `try_candidate`, and call `wait`
again and again until there is a verdict. Use these tools in place of the commands that the program names.
"""


def mcp_verb(given: str | None) -> None:
    """Serve until standard input is closed. Raises `UserError` where there is no lab, or no SDK."""
    from core.lab import Lab

    lab, _ = Lab.find(str(places.place(given)) if given else None)
    server(lab.path.resolve()).run()


def server(lab: Path) -> MCPServer:
    """The server of one lab."""
    try:
        from mcp.server import MCPServer
    except ImportError as error:
        raise UserError(f"the MCP SDK is not there ({error})", INSTALL) from None
    made = MCPServer("autoresearch", instructions=f"{INSTRUCTIONS}The lab's folder is {lab}.\n")
    _looking(made, lab)
    _doing(made, lab)
    return made


def _looking(made: MCPServer, lab: Path) -> None:
    """Tools that change nothing."""
    from mcp.types import ToolAnnotations

    reads = ToolAnnotations(read_only_hint=True)

    @made.tool(annotations=reads)
    def program() -> str:
        """The lab's program.md: what the human wants, and how the research goes. Read it before each new idea."""
        return (lab / "program.md").read_text("utf-8", "replace")

    @made.tool(annotations=reads)
    def kernels() -> str:
        """What train.py may import from `kernels` (cuda and rtx): shapes, equations, and how to write each part out."""
        from core.importable import text

        return text()

    @made.tool(annotations=reads)
    def status() -> dict[str, Any]:
        """Whether something runs, and how far it is; the best so far."""
        return _verb(lab, "status")

    @made.tool(annotations=reads)
    def best() -> dict[str, Any]:
        """The best experiment so far, and what led to it."""
        return _verb(lab, "best")

    @made.tool(annotations=reads)
    def best_source() -> str:
        """The train.py of the best."""
        return str(_verb(lab, "best", more=["--source"])["source"])

    @made.tool(annotations=reads)
    def log(limit: int = 50, kept: bool = False) -> dict[str, Any]:
        """The last `limit` experiments: number, status, val_bpb, description; with `kept` only what was kept."""
        return _verb(lab, "log", more=["--limit", str(max(1, limit)), *(["--kept"] if kept else [])])

    @made.tool(annotations=reads)
    def show(number: int) -> dict[str, Any]:
        """Everything about one experiment: score, steps, tokens, memory, times, the end of its log."""
        return _verb(lab, "show", str(number))

    @made.tool(annotations=reads)
    def diff(number: int) -> str:
        """What experiment `number` changed in train.py."""
        return str(_verb(lab, "diff", str(number))["diff"])[:DIFF]


def _doing(made: MCPServer, lab: Path) -> None:
    """Tools that hand in, wait and write."""

    @made.tool()
    def try_candidate(message: str) -> dict[str, Any]:
        """Hand in the train.py that now lies in the lab. `message`: what was changed and why, in one line. Returns its
        number at once; call `wait` with it. The same file again is the same experiment."""
        return _verb(lab, "try", more=["-m", message, "--no-wait"])

    @made.tool()
    def wait(number: int, seconds: float = WAIT) -> dict[str, Any]:
        """Wait for experiment `number`, 30 seconds at most; `running` is true while there is no verdict yet: call it
        again then. After a verdict train.py is the best one again."""
        found = _verb(lab, "wait", str(number), more=["--timeout", f"{min(max(seconds, 0.0), WAIT):g}s"])
        return {**found, "running": found["experiment"]["status"] is None}

    @made.tool()
    def report() -> dict[str, Any]:
        """Draw the night: report.html and report.png in the lab. Returns where they are."""
        return _verb(lab, "report")


def _verb(lab: Path, name: str, *arguments: str, more: list[str] | None = None) -> dict[str, Any]:
    """The JSON document of a verb. Raises the SDK's `ToolError` with fact and next action where the verb has an error.

    Exit status 1 with a document is a verdict (the experiment failed), 124 one that is not there yet.
    """
    from mcp.server.mcpserver.exceptions import ToolError

    cli = Path(__file__).resolve().parent.parent / "cli.py"
    where = ["--lab", str(lab)] if name in ("wait", "show", "diff") else [str(lab)]
    argv = [sys.executable, str(cli), name, *arguments, *where, *(more or []), "--json"]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CALL - 2)
    except subprocess.TimeoutExpired:
        raise ToolError(f"`{name}` took longer than {CALL - 2:.0f} s; the machine is busy: call it again") from None
    try:
        found = json.loads(done.stdout)
    except ValueError:
        raise ToolError(_complaint(done.stderr)) from None
    return dict(found)


def _complaint(stderr: str) -> str:
    """'fact; action' of an error on stderr."""
    last = (stderr.strip().splitlines() or ["no reason given"])[-1]
    try:
        error = json.loads(last)["error"]
    except (ValueError, KeyError, TypeError):
        return last[:500]
    return f"{error['fact']}; {error['action']}" if error.get("action") else str(error["fact"])
