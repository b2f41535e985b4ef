"""The documents keep their promises to a newcomer: two command blocks, links that lead somewhere, nothing private."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "program.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_first_two_bash_blocks_install_and_run_then_install_and_test():
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    assert len(blocks) == 2, "other commands stand in differently fenced blocks"
    assert all("python3 -m venv" in block and "pip install -e" in block for block in blocks)
    assert "autoresearch run --demo" in blocks[0]
    assert "pytest" in blocks[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_documents_lead_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_every_verb_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"autoresearch ([a-z]+)\b", text)) - {"is", "on", "that"}
    shown = subprocess.run(
        [sys.executable, "-m", "cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    missing = {verb for verb in named if not re.search(rf"^\s+{verb}\b", shown, re.M)}
    assert not missing
