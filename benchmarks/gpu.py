"""Everything that an NVIDIA card can tell, in one command of at most nine minutes, without a network.

    python -m benchmarks.gpu --out results
    python -m benchmarks.gpu --out results --upstream ~/autoresearch --data FOLDER    # a clone; what `prepare` made
    python -m benchmarks.gpu --out results --only attention --only mlp

Each section runs in a process of its own, so that a fault of one leaves the others; what it found is written to
`results.json` and `results.md` as it goes. `--smoke` runs small shapes on a CPU by Triton's interpreter: it shows that
the command works, and its times mean nothing.

It imports torch, triton, numpy and what of ours needs no more: it runs on a machine where nothing else is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {  # seconds of each section; 540 in all
    "facts": 20,
    "correctness": 90,
    "attention": 90,
    "mlp": 40,
    "head": 40,
    "muon": 40,
    "step": 110,
    "upstream": 110,
}


@dataclass(frozen=True)
class Order:
    """What a section works on."""

    rows: int = 64
    context: int = 2048
    heads: int = 4
    head_dim: int = 128
    depth: int = 8
    vocab: int = 8192
    tokens: int = 2**18  # of one optimizer step
    steps: int = 200
    device: str = "cuda:0"
    upstream: str = ""
    data: str = ""  # folder of a prepared data set; else random tokens

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


SMOKE = Order(2, 64, 2, 32, 2, 97, 128, 3, "cpu")


def run_section(name: str, order: Order, limit: float) -> Iterator[dict[str, Any]]:
    """The rows that the section's process prints, then one of how it ended where that was not well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if order.device == "cpu":
        environment |= {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu_sections", name, json.dumps(asdict(order))]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, errors = process.communicate(timeout=limit)
        ended = "" if process.returncode == 0 else f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        ended = f"not done within {limit:.0f} s"
    for line in out.splitlines():
        if line.startswith("{"):
            yield {"section": name, **json.loads(line)}
    if ended:
        last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
        yield {"section": name, "failed": ended, "error": last[:400]}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one table a section, in the order in which they ran."""
    lines = []
    for section in dict.fromkeys(row["section"] for row in rows):
        found = [{k: v for k, v in row.items() if k != "section"} for row in rows if row["section"] == section]
        columns = list(dict.fromkeys(name for row in found for name in row))
        lines += [f"## {section}", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        lines += [f"| {' | '.join(_cell(row.get(c)) for c in columns)} |" for row in found] + [""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for results.json and results.md.")
@click.option("--upstream", type=click.Path(path_type=Path, exists=True), help="A clone of karpathy/autoresearch.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="A data set that `prepare` made.")
@click.option("--only", multiple=True, type=click.Choice(list(LIMITS)), help="Default: all sections.")
@click.option("--smoke", is_flag=True, help="Small shapes on a CPU by Triton's interpreter.")
def main(out: Path, upstream: Path | None, data: Path | None, only: tuple[str, ...], smoke: bool) -> None:
    """Correctness, speed and memory of the CUDA kernels and recipe on this card."""
    order = Order(**{**asdict(SMOKE if smoke else Order()), "upstream": str(upstream or ""), "data": str(data or "")})
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name, limit in LIMITS.items():
        if (only and name not in only) or (name == "upstream" and not upstream):
            continue
        began = time.monotonic()
        for row in run_section(name, order, limit):
            rows.append(row)
            click.echo("  ".join(f"{k} {_cell(v)}" for k, v in row.items()))
        click.echo(f"{name}: {time.monotonic() - began:.0f} s")
        (out / "results.json").write_text(json.dumps({"order": asdict(order), "rows": rows}, indent=1))
        (out / "results.md").write_text(table(rows))
    if any("failed" in row or row.get("passed") is False for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
