"""A run that is stopped while an answer of Claude still comes: what the answer took by then is on the lab's account."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from messages_api import Answer, MessagesApi, script, text
from scripted import Scripted, make_lab

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
