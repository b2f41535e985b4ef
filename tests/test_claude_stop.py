"""Claude in a lab: a run that is stopped while an answer still comes, and what the model is told of `kernels`."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from messages_api import Answer, MessagesApi, script, text
from scripted import Scripted, make_lab

from core.contract import Unavailable
from core.loop import Limits, Loop
from core.settings import Settings
from researchers.claude import Claude


def test_an_answer_that_still_comes_at_a_stop_is_on_the_account(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-planted")
    lab = make_lab(tmp_path / "night", settings)
    with MessagesApi(script([Answer([text("x" * 40_000)], pause=0.05)])) as api:  # 50 s in all
        monkeypatch.setenv("ANTHROPIC_BASE_URL", api.url)
        loop = Loop(lab, Claude(), Scripted(seconds=0.01), lambda event: None)

        def stop_soon() -> None:
            while not api.billed:
                time.sleep(0.05)
            time.sleep(1.0)
            loop.stop()

        threading.Thread(target=stop_soon, daemon=True).start()
        summary = loop.run(Limits())
        billed = api.billed[0]
    assert summary.reason == "stopped"
    spent = lab.ledger.spent()
    assert spent.answers == 1
    assert spent.cache_write_tokens == billed["cache_creation_input_tokens"] > 0
    assert 0 < spent.output_tokens < billed["output_tokens"]


def test_what_a_recipe_may_import_is_told_within_the_part_that_stays(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-planted")
    lab = make_lab(tmp_path / "night", settings)
    with MessagesApi(script([Answer([text("so far")])] * 20)) as api:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", api.url)
        view = replace(lab.view({}), importable="# What a recipe may import")
        with pytest.raises(Unavailable):
            Claude().propose(view)
        told = api.requests[0].body["system"]
    assert [block["text"] for block in told].index("# What a recipe may import") == 1
    assert [i for i, block in enumerate(told) if "cache_control" in block] == [2]  # behind it
