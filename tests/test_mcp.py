"""The MCP server over standard input and output, driven by the official client."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.lab import Lab
from core.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
CLI = str(ROOT / "cli.py")


def value(result: Any) -> Any:
    """What a tool returned; its text where it is no JSON."""
    assert not result.is_error, result.content
    words = result.content[0].text
    try:
        return json.loads(words)
    except ValueError:
        return words


async def drive(lab: Lab, recipe: str, home: Path) -> None:
    from mcp import Client, StdioServerParameters, stdio_client

    env = {"AUTORESEARCH_HOME": str(home)}
    started = StdioServerParameters(command=sys.executable, args=[CLI, "mcp", str(lab.path)], env=env)
    async with Client(stdio_client(started)) as client:

        async def call(name: str, **arguments: Any) -> Any:
            return value(await client.call_tool(name, arguments, read_timeout_seconds=45))

        async def judged(message: str) -> dict[str, Any]:
            number = (await call("try_candidate", message=message))["number"]
            while (found := await call("wait", number=number, seconds=20))["running"]:
                pass
            return dict(found["experiment"])

        listed = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(listed) == {"program", "kernels", "status", "best", "best_source", "log", "show", "diff",
                               "try_candidate", "wait", "report"}  # fmt: skip
        assert "val_bpb" in await call("program")
        assert "kernels.lean" in await call("kernels")
        refused = await client.call_tool("best", {})
        assert refused.is_error and "no best yet" in refused.content[0].text
        assert (await judged("baseline"))["status"] == "keep"
        (lab.path / "train.py").write_text(recipe.replace("LR = 0.02", "LR = 0.03"))
        second = await judged("LR 0.02 -> 0.03: still falling")
        assert second["status"] in ("keep", "discard") and second["val_bpb"] > 0
        (lab.path / "train.py").write_text(recipe.replace("import numpy", "import os"))
        lint = await client.call_tool("try_candidate", {"message": "a forbidden import"})
        assert lint.is_error and "os" in lint.content[0].text
        (lab.path / "train.py").write_bytes(lab.best_source())
        assert [e["number"] for e in (await call("log"))["experiments"]] == [1, 2]
        assert "+LR = 0.03" in await call("diff", number=2)
        assert (await call("show", number=2))["experiment"]["description"].startswith("LR 0.02")
        assert "def build" in await call("best_source")
        assert (await call("best"))["best"]["val_bpb"] > 0 and (await call("status"))["running"] is None
        missing = await client.call_tool("show", {"number": 99})
        assert missing.is_error and "99" in missing.content[0].text
        await call("report")
        assert (lab.path / "report.html").is_file()


@pytest.mark.slow
def test_the_official_client_drives_a_lab(tmp_path: Path, settings: Settings, tiny_recipe: str, home: Path) -> None:
    pytest.importorskip("mcp", reason="the extra `mcp` is not installed")
    lab = Lab.create(tmp_path / "lab", recipe=tiny_recipe.encode(), program=(ROOT / "program.md").read_text(),
                     settings=settings, message="lab: the first recipe")  # fmt: skip
    asyncio.run(drive(lab, tiny_recipe, home))


def test_without_the_sdk_the_error_says_how_to_get_it(tmp_path: Path, settings: Settings, tiny_recipe: str) -> None:
    lab = Lab.create(tmp_path / "lab", recipe=tiny_recipe.encode(), program="", settings=settings, message="lab")
    code = f"import sys; sys.modules['mcp'] = None; sys.path.insert(0, {str(ROOT)!r}); import cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", code, "mcp", str(lab.path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "MCP SDK is not there" in done.stderr and "pip install -e" in done.stderr
    assert ".[mcp]" in done.stderr and "autoresearch[mcp]" not in done.stderr
    assert "Traceback" not in done.stderr
