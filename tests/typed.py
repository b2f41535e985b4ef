"""The command line as it is typed, in this process, where experiments follow a script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from scripted import Loop, Scripted, make_lab, recipe

from cli import cli
from core.lab import Lab
from core.settings import Settings

Verb = Callable[..., Result]


def typed_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Verb:
    """What runs a verb in this folder and asserts its exit status."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("core.executor.LocalExecutor", Scripted)

    def run(*arguments: Any, status: int = 0) -> Result:
        done = CliRunner().invoke(cli, [*map(str, arguments)])
        assert done.exit_code == status, (done.output, done.stderr, done.exception)
        return done

    return run


def quick_lab(folder: Path, settings: Settings) -> Lab:
    """./labs/quick with a baseline of 2.0 and a keep of 1.5."""
    lab = make_lab(folder / "labs" / "quick", settings)
    judge = Loop(lab, None, Scripted(), lambda event: None).judge
    judge(lab.working_source(), "baseline")
    assert judge(recipe(1.5), "better").is_kept
    return lab
