"""Everything that an NVIDIA card can tell of both backends, in one command, without a network, in nine minutes at
most.

    python -m benchmarks.gpu --out results
    python -m benchmarks.gpu --out results --upstream ~/autoresearch --data FOLDER    # a clone; what `prepare` made
    python -m benchmarks.gpu --out results --only attention --only mlp
    python -m benchmarks.gpu --out results --only rtx --limit-gb 6    # as on a smaller card

Each section runs in a process of its own, so that a fault of one leaves the others; what it finds is written to
`results.json` and `results.md` row by row. `--smoke` runs small shapes on a CPU by Triton's interpreter: it shows that
the command works, and its times mean nothing. On a card the first section says how many rows at once fit into what is
free, and the others take as many.

It imports torch, triton, numpy and what of ours needs no more: it runs on a machine where nothing else is installed.
The section `run` wants tiktoken, pyarrow and psutil too, and says so where one is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from core import allocator
from core import caches as compile_caches
from core.files import replace_file

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 540.0  # seconds, whatever sections there are
LIMITS = {  # seconds of each section, and beyond them what the sections before left over; together no more than TOTAL
    "facts": 40,  # the first import of torch on a machine that just started; without them no other has fitting rows
    # What the steps choose by, then the steps: a machine that is taken away early has told what the command is for.
    "correctness": 65,
    "attention": 65,
    "mlp": 15,
    "step": 75,  # its kernels are compiled by then
    "upstream": 135,  # right behind the step: the ratio of both is what the command is for
    "run": 90,  # a trainer that compiles in one thread, 15 s of training, a scorer and an auditor
    "rtx": 40,
    "head": 5,  # these three live on what the others leave over
    "muon": 5,
    "fp8": 5,
}


@dataclass(frozen=True)
class Order:
    """What a section works on."""

    rows: int = 128  # at once, or what fits; these and the tokens below are of the figures that upstream publishes
    context: int = 2048
    heads: int = 4
    head_dim: int = 128
    depth: int = 8
    vocab: int = 8192
    tokens: int = 2**19  # of one optimizer step
    steps: int = 200
    device: str = "cuda:0"
    upstream: str = ""
    recipe: str = ""  # a file in the place of the shipped recipe of `cuda`
    data: str = ""  # folder of a prepared data set; else random tokens
    caches: str = ""  # folder of what the sections have compiled and chosen, laid out as that of a referee's child
    limit: float = 0.0  # seconds that the section has
    ends: float = 0.0  # when they are over, by time.time(); 0: never
    limit_gb: float = 8.0  # of 10^9 bytes, to which the section `rtx` holds the card's allocator; more really fails
    # constants of the recipe, where it is not to choose by itself
    told: Mapping[str, str] = field(default_factory=dict)
    allocator: str = ""  # how PyTorch's is set, where it does not work as usual
    skip: int = 0  # checks of `correctness` that are done
    seed: int = 42  # of the weights
    text: int = 0  # tokens of the data that are left out before the first batch

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


SMOKE = Order(2, 64, 2, 32, 2, 97, 128, 3, "cpu")
KILLED_WITHIN = 10.0  # seconds
POLL = 1.0  # seconds after which what a section has printed is read again
WHOLE = "stderr"  # of a section that failed: in the JSON only
RESTART = "checks done"  # of the row behind which a section needs another process
UNTIMED = {  # what a recipe takes where its section ended before so many choices were made
    "attention": ({"ATTENTION": "triton"}, 2),  # of its two windows, which come first
    "mlp": ({"MLP": "torch"}, 1),
}
RESUMED = "correctness"  # whose checks go on in another process behind one that crashed or hung
PATIENCE = 45.0  # seconds without a row after which one of them hangs; the first one imports and compiles
RESUMES = 4  # at most
CONSTANTS = "constants"  # of rows of steps with which both sides have the same: ours by itself has others
ALIKE = "upstream's, the scalars' epsilon 1e-5"
ALLOCATOR = "allocator"  # of the row by which `facts` says how PyTorch's has to be set here


def run_section(name: str, order: Order, limit: float, caches: Path | None = None) -> Iterator[dict[str, Any]]:
    """The rows that the section's process prints, then one of how it ended where that was not well.

    caches: where one section leaves to the next what it has compiled, and what was chosen by time.
    """
    given = os.environ.get("PYTHONPATH")  # where packages may lie that were brought along
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{given}" if given else str(ROOT)}
    environment |= {allocator.NAMES[0]: order.allocator} if order.allocator else allocator.settings(environment)
    order = replace(order, limit=limit, ends=time.time() + limit)
    if caches:
        caches = caches.resolve()
        caches.mkdir(parents=True, exist_ok=True)
        order = replace(order, caches=str(caches))
        environment |= compile_caches.environment(caches)  # a child of the section `run` finds it all again
    if order.device == "cpu" and name != "rtx":  # whose recipe takes torch where there is no card
        environment |= {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu_sections", name, json.dumps(asdict(order))]
    # Files, not pipes: compilers that outlive a section's end would hold a pipe open, and this process up.
    with tempfile.TemporaryDirectory(prefix="autoresearch-", ignore_cleanup_errors=True) as folder:
        written, complained = Path(folder, "rows"), Path(folder, "errors")
        with written.open("wb") as out, complained.open("wb") as errors:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=errors)
        try:
            end, patience = time.monotonic() + limit, PATIENCE if name == RESUMED else math.inf
            for line in _lines(written, process, end, patience):
                row = _row(line)
                if row is not None:
                    yield {"section": name, **row}
            if process.poll() is None:
                over = time.monotonic() >= end
                ended = f"not done within {limit:.0f} s" if over else f"no row for {patience:.0f} s"
            else:
                ended = f"exit status {process.returncode}" if process.returncode else ""
        finally:
            if process.poll() is None:  # its time is over, or whoever reads the rows wants no more
                process.kill()
                with suppress(subprocess.TimeoutExpired):  # one that is stuck in the driver stays
                    process.wait(KILLED_WITHIN)
        said = complained.read_text(encoding="utf-8", errors="replace")
    if ended:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
        yield {"section": name, "failed": ended, "error": last[:400], WHOLE: said[-6000:]}


def resumed(name: str, order: Order, end: float, caches: Path) -> Iterator[dict[str, Any]]:
    """`run_section` until `end`, by time.monotonic(); checks that are left behind one that ended its process are run in
    another."""
    done: int | None = 0
    for _ in range(1 + RESUMES):
        order, done, told = replace(order, skip=done or 0), None, 0
        for row in run_section(name, order, max(0.0, end - time.monotonic()), caches):
            yield row
            done, told = row.get(RESTART), told + 1
            if WHOLE in row and name == RESUMED:
                done = order.skip + told  # with the one that has no row of its own but this
        if done is None or time.monotonic() >= end:
            return


def _lines(written: Path, process: subprocess.Popen[bytes], end: float, patience: float) -> Iterator[str]:
    """What the process writes, line by line as it comes, until it ends, its time does, or nothing comes for so long."""
    begun, heard = b"", time.monotonic()  # of a line that is not all there; when there was one
    with written.open("rb") as file:
        running = True
        while running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, min(POLL, end - time.monotonic())))
            now = time.monotonic()
            running = process.poll() is None and now < min(end, heard + patience)  # asked before what is there is read
            *lines, begun = (begun + file.read()).split(b"\n")
            heard = now if lines else heard
            yield from (line.decode("utf-8", "replace") for line in lines)
    yield begun.decode("utf-8", "replace")


def _row(line: str) -> dict[str, Any] | None:
    """What a section has printed as a row; None for the rest: libraries print too, and the last line may be cut off."""
    if not line.startswith("{"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one table a section, in the order in which they ran."""
    lines = []
    for section in dict.fromkeys(row["section"] for row in rows):
        found = [
            {k: v for k, v in row.items() if k not in ("section", WHOLE)} for row in rows if row["section"] == section
        ]
        columns = list(dict.fromkeys(name for row in found for name in row))
        lines += [f"## {section}", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        lines += [f"| {' | '.join(_cell(row.get(c)) for c in columns)} |" for row in found] + [""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours beside upstream, after the last count of steps that both told. Where there is none, as on a slow card, time
    and memory of each side's last, and no losses; nothing where a side made one step only, which compiles.

    Upstream's attention is named beside its time: it is what was at hand, and decides what the ratio means. Where both
    had the same constants, the difference of losses is another row: it tells of kernels, not of what is learnt by.
    """
    told = [row for row in rows if "steps" in row]
    ours, peer, our_alike, peer_alike = (
        {row["steps"]: row for row in told if row["section"] == section and (CONSTANTS in row) is same}
        for same in (False, True)
        for section in ("step", "upstream")
    )
    both = ours.keys() & peer.keys()
    if not both and min(max(ours, default=0), max(peer, default=0)) < 2:
        return []
    mine, other = (side[max(both or side)] for side in (ours, peer))
    named = {"upstream_attention": other["attention"]} if "attention" in other else {}
    found: list[dict[str, Any]] = [{"step_ratio": other["ms"] / mine["ms"], **named}]
    if "peak_gib" in mine and "peak_gib" in other:
        found.append({"memory_ratio": mine["peak_gib"] / other["peak_gib"]})
    if both:
        found.append({"loss_difference": mine["loss"] - other["loss"]})
    counts = {"steps": other["steps"]} | ({} if both else {"our_steps": mine["steps"]})
    found = [{**counts, **row} for row in found]
    if common := our_alike.keys() & peer_alike.keys():
        last = max(common)
        difference = our_alike[last]["loss"] - peer_alike[last]["loss"]
        found.append({"steps": last, CONSTANTS: ALIKE, "loss_difference": difference})
    return [{"section": "upstream", **row} for row in found]


def heeded(order: Order, rows: Sequence[Mapping[str, Any]]) -> Order:
    """What later sections work on after the last of these rows.

    As many rows at once as `facts` says; the allocator that works, where segments that grow are refused; and what is
    left to be taken where timing what the recipe chooses from was cut: it would time it too, and what hangs would hang
    it.
    """
    row, name = rows[-1], rows[-1]["section"]
    if "rows_at_once" in row and name == "facts":
        order = replace(order, rows=row["rows_at_once"])
    if row.get("setting") == ALLOCATOR:
        order = replace(order, allocator=row["value"])
    if "failed" in row and name in UNTIMED:
        taken, choices = UNTIMED[name]
        if sum("chosen" in r for r in rows if r["section"] == name) < choices:
            order = replace(order, told={**order.told, **taken})
    return order


def measure(order: Order, names: Sequence[str], out: Path) -> int:
    """Runs these sections, within `TOTAL` seconds, and writes each row as it comes; the exit status.

    What they compile lies outside of `out`, which holds two small files that can be sent.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print("  ".join(f"{k} {_cell(v)}" for k, v in row.items() if k != WHOLE), flush=True)
        replace_file(out / "results.json", json.dumps({"order": asdict(order), "rows": rows}, indent=1).encode())
        replace_file(out / "results.md", table(rows).encode())

    end = time.monotonic() + TOTAL
    with tempfile.TemporaryDirectory(prefix="autoresearch-", ignore_cleanup_errors=True) as caches:
        for i, name in enumerate(names):
            began = time.monotonic()
            later = sum(LIMITS[n] for n in names[i + 1 :])
            limit = max(0.0, min(max(LIMITS[name], end - began - later), end - began))
            for row in resumed(name, order, began + limit, Path(caches)):
                keep(row)
                order = heeded(order, rows)
            if name == "upstream":
                for row in ratios(rows):
                    keep(row)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return int(any("failed" in row or row.get("passed") is False for row in rows))


def without_card() -> str:
    """Why there is nothing to measure, "" where torch has a card. Asked in a process of its own, as this one keeps none
    of a card's memory."""
    code = "import torch; print(torch.__version__, torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"torch cannot be imported: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    version, there = done.stdout.split()
    return "" if there == "True" else f"torch {version} finds no NVIDIA GPU"


def main(arguments: Sequence[str] | None = None) -> None:
    """Correctness, speed and memory of the kernels and of the cuda and rtx recipes on this card."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=main.__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for results.json and results.md")
    parser.add_argument("--upstream", type=Path, help="a clone of karpathy/autoresearch")
    parser.add_argument("--data", type=Path, help="a data set that `prepare` made")
    parser.add_argument("--only", action="append", choices=list(LIMITS), help="default: all sections")
    parser.add_argument(
        "--limit-gb",
        type=float,
        default=Order.limit_gb,
        help="GB (10^9 bytes) that the section rtx may take; default 8",
    )
    parser.add_argument("--smoke", action="store_true", help="small shapes on a CPU by Triton's interpreter")
    given = parser.parse_args(arguments)
    for folder in (given.upstream, given.data):
        if folder and not folder.is_dir():
            sys.exit(f"there is no folder {folder}; give another, or leave the option out")
    if given.limit_gb <= 0:
        sys.exit(f"--limit-gb {given.limit_gb:g} leaves no memory; give a positive number of GB")
    if not given.smoke and (why := without_card()):
        sys.exit(f"{why}; `autoresearch doctor` says what to do, and --smoke runs small shapes on the processor")
    wishes = {"upstream": str(given.upstream or ""), "data": str(given.data or ""), "limit_gb": given.limit_gb}
    order = Order(**{**asdict(SMOKE if given.smoke else Order()), **wishes})
    wanted = {*(given.only or LIMITS)} | (set() if given.smoke else {"facts"})  # which say what fits into the card
    names = [n for n in LIMITS if n in wanted and (n != "upstream" or given.upstream)]
    sys.exit(measure(order, names, given.out))


if __name__ == "__main__":
    main()
