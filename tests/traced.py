"""A report's figures, worked out again from the ledger by SQL and schoolbook arithmetic: no code of the report's."""

from __future__ import annotations

import ast
import json
import math
import sqlite3
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, median
from typing import Any

from scipy import stats

QUIET = {"style", "title", "code", "pre"}  # whose text holds no figures of the report's
QUOTED = {"says", "axis", "scale"}  # classes of what is quoted from the ledger, and of axes


class Figures(HTMLParser):
    """Every figure of a page, and all other text that holds a digit."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str, bool]] = []  # (tag, key, is its text quoted?)
        self.found: list[tuple[str, Any, str]] = []  # (key, exact value, text)
        self.stray: list[str] = []
        self.feed(page.removeprefix("<!doctype html>"))

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        given = {k: v or "" for k, v in attrs}
        if tag in ("meta", "br"):
            return
        classes = set(given.get("class", "").split())
        inside = bool(self.open) and self.open[-1][2]
        quoted = inside or tag in QUIET or bool(classes & QUOTED) or tag in ("a", "footer", "title")
        key = given.get("data-of", "")
        self.open.append((tag, key, quoted))
        if key:
            self.found.append((key, ast.literal_eval(given["data-value"]), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][1]:
            key, value, text = self.found[-1]
            self.found[-1] = (key, value, text + data)
        elif any(c.isdigit() for c in data.replace("95 %", "")) and not (self.open and self.open[-1][2]):
            self.stray.append(data.strip())


class Truth:
    """What each key has to be. `themes`: (description -> theme), known to whoever made the night."""

    def __init__(self, ledger: Path, worth: float, budget: float, seed: int) -> None:
        self.db = sqlite3.connect(ledger)
        self.db.row_factory = sqlite3.Row
        self.worth, self.seed = worth, seed
        self.rows = {r["number"]: r for r in self.db.execute("SELECT * FROM experiments ORDER BY number")}
        self.samples = [dict(r) for r in self.db.execute("SELECT * FROM samples ORDER BY id")]
        self.ablated = [
            dict(r) for r in self.db.execute("SELECT r.*, a.number, a.winner, a.source_sha256 FROM ablation_runs r"
                                             " JOIN ablations a ON a.id = r.ablation ORDER BY r.id")
        ]  # fmt: skip
        kept = "SELECT number FROM experiments WHERE status IN ('keep', 'simplify') AND undone IS NULL ORDER BY number"
        self.kept = [r[0] for r in self.db.execute(kept)]
        self.outcomes = {n: json.loads(r["outcome"] or "{}") for n, r in self.rows.items()}
        totals = [o["timings"]["total"] for o in self.outcomes.values() if o.get("val_bpb")]
        self.each = median(totals[-5:]) if totals else budget

    # --- statistics ----------------------------------------------------------------------------

    def confirmed(self, number: int, column: str = "val_bpb") -> list[float]:
        return [
            s[column] for s in self.samples
            if s["number"] == number and s["purpose"] == "confirm" and not s["tainted"] and s[column] is not None
        ]  # fmt: skip

    def groups(self, column: str) -> list[list[float]]:
        """Runs of one recipe that no decision has chosen."""
        found: dict[tuple[Any, ...], list[float]] = {}
        for s in self.samples:
            free = s["purpose"] != "verdict" or s["number"] == self.kept[0]
            if free and not s["tainted"] and s[column] is not None:
                found.setdefault((s["number"], s["versions"], s["epoch"]), []).append(s[column])
        for s in self.ablated if column == "val_bpb" else ():
            if not s["tainted"]:
                found.setdefault((s["ablation"], s["versions"], s["epoch"], "ablation"), []).append(s[column])
        return [g for g in found.values() if len(g) > 1]

    def spread(self, column: str = "val_bpb") -> tuple[float, int]:
        groups = self.groups(column)
        df = sum(len(g) - 1 for g in groups)
        return math.sqrt(sum((x - fmean(g)) ** 2 for g in groups for x in g) / df), df

    def change(self, before: int, after: int, column: str = "val_bpb") -> tuple[float, float, float]:
        """(change, lower end, upper end)."""
        a, b = self.confirmed(before, column), self.confirmed(after, column)
        sd, df = self.spread(column)
        half = stats.t.ppf(0.975, df) * sd * math.sqrt(1 / len(a) + 1 / len(b))
        middle = fmean(b) - fmean(a)
        return middle, middle - half, middle + half

    def without(self, number: int) -> tuple[float, float, str]:
        """(change of the winner when experiment `number` is left out, half its interval, runs without and with)."""
        row = self.db.execute(
            "SELECT * FROM ablations WHERE number = ? AND winner = ? ORDER BY id DESC LIMIT 1", (number, self.kept[-1])
        ).fetchone()
        a = [s["val_bpb"] for s in self.ablated if s["ablation"] == row["id"] and not s["tainted"]]
        a += [x for n, r in self.rows.items() if r["source_sha256"] == row["source_sha256"] for x in self.confirmed(n)]
        b = self.confirmed(self.kept[-1])
        sd, df = self.spread()
        half = stats.t.ppf(0.975, df) * sd * math.sqrt(1 / len(a) + 1 / len(b))
        return fmean(a) - fmean(b), half, f"{len(a)}+{len(b)}"

    def left(self, numbers: Sequence[int], seeds: int = 4, holdout: bool = False) -> float:
        """Seconds until these are confirmed."""
        wanted = {(n, self.seed + 1000 + k) for n in numbers for k in range(seeds)}
        there = {
            (s["number"], s["seed"]) for s in self.samples
            if s["purpose"] == "confirm" and not s["tainted"] and (s["holdout_bpb"] is not None or not holdout)
        }  # fmt: skip
        return len(wanted - there) * self.each

    def state(self, number: int) -> str:
        before = self.kept[self.kept.index(number) - 1]
        if not self.confirmed(before) or not self.confirmed(number):
            return "unconfirmed"
        _, low, high = self.change(before, number)
        return "replicated" if high < 0 else "not replicated" if low > -self.worth else "open"

    # --- time ----------------------------------------------------------------------------------

    def runs(self) -> list[tuple[str, dict[str, Any]]]:
        """(why it was wasted or "", outcome) of every run on the record."""
        found = [("tainted" if s["tainted"] else "", json.loads(s["outcome"])) for s in self.samples if s["outcome"]]
        failed = [
            (o["status"], o) for o in self.outcomes.values() if o.get("status") in ("crash", "timeout", "invalid")
        ]
        old = {s["number"] for s in self.samples if not s["outcome"]}
        found += [("tainted" if s["tainted"] else "", json.loads(s["outcome"])) for s in self.ablated]
        return found + failed + [("", self.outcomes[n]) for n in sorted(old)]

    def took(self, number: int) -> float:
        """All runs of an experiment until it was decided."""
        last = self.outcomes[number]
        before = [run for run in json.loads(self.rows[number]["verdict"])["all_runs"] if run["bpb"] != last["val_bpb"]]
        return last["timings"]["total"] + sum(run["seconds"] for run in before)

    def seconds(self) -> dict[str, float]:
        found: dict[str, float] = {"training": 0.0, "scoring": 0.0, "starting": 0.0}
        for why, o in self.runs():
            t = o["timings"]
            if why:
                found[f"wasted.{why}"] = found.get(f"wasted.{why}", 0.0) + t["total"]
                continue
            judged = sum(seconds for name, seconds in t.items() if name.endswith(("scoring", "audit")))
            found["training"] += o["training_seconds"]
            found["scoring"] += judged
            found["starting"] += t["total"] - o["training_seconds"] - judged
        idle = [o["idle"] for _, o in self.runs() if o.get("idle")]
        for what in ("thinking", "dry build", "waiting"):
            found[f"idle.{what}"] = sum(i.get(what, 0.0) for i in idle)
        found["paused"] = sum(i.get("paused", 0.0) for i in idle)
        known = sum(v for k, v in found.items() if k.startswith("idle"))
        found["idle.other"] = sum(i["seconds"] for i in idle) - found["paused"] - known
        return found


def spent(db: sqlite3.Connection) -> dict[str, Any]:
    row = db.execute(
        "SELECT coalesce(sum(usd), 0.0), count(*), sum(input_tokens + cache_write_tokens), sum(output_tokens),"
        " sum(cache_read_tokens), sum(usd IS NULL) FROM spending"
    ).fetchone()
    return dict(zip([f"spent.{k}" for k in ("usd", "answers", "in", "out", "cached", "unpriced")], row, strict=True))


def expected(truth: Truth) -> dict[str, Callable[..., Any]]:
    """The part of a key before its variable parts -> what it has to be."""
    rows, kept = truth.rows, truth.kept
    first, last = (kept[0], kept[-1]) if kept else (0, 0)
    status = [r["status"] for r in rows.values() if r["status"]]
    groups = truth.groups("val_bpb") if kept else []
    count: dict[str, Any] = {
        "tally.experiments": len(status),
        "tally.kept": max(0, len(kept) - 1),
        "tally.discarded": status.count("discard"),
        "tally.failed": sum(status.count(s) for s in ("crash", "timeout", "invalid")),
        "noise.runs": sum(map(len, groups)),
        "noise.recipes": len(groups),
        "rules.simple": max(0, len([s for s in status if s in ("keep", "simplify")]) - 1),
        "machine.tainted": sum(s["tainted"] for s in [*truth.samples, *truth.ablated]),
        "machine.experiments": len({s["number"] for s in truth.samples if s["tainted"]}),
        "machine.again": truth.db.execute("SELECT count(*) FROM events WHERE kind = 'requeued'").fetchone()[0],
        **spent(truth.db),
    }
    seconds = truth.seconds()
    whole = sum(s for s in seconds.values() if s >= 0.5)
    busy = sum(s for k, s in seconds.items() if not k.startswith(("idle", "paused")))
    idle = sum(s for k, s in seconds.items() if k.startswith("idle"))
    worked = sum(o["timings"]["total"] for _, o in truth.runs() if o.get("idle"))

    def score(number: int) -> float:
        return float(rows[number]["val_bpb"])

    def of_gain(part: str, *end: str) -> float | int:
        column = {"val": "val_bpb", "holdout": "holdout_bpb"}[part]
        if end and end[0].startswith("runs"):
            return len(truth.confirmed(first if end[0] == "runs_before" else last, column))
        return truth.change(first, last, column)[{"": 0, "high": 1, "low": 2}["".join(end)]]

    def of_kept(number: str, what: str = "", end: str = "") -> Any:
        if number == "without":
            there = {r[0] for r in truth.db.execute("SELECT number FROM ablations WHERE winner = ?", (last,))}
            return len(set(kept[1:]) - there) * 4 * truth.each + truth.left([last])
        if what == "without":
            return truth.without(int(number))[("", "half", "runs").index(end)]
        if not number.isdigit():
            states = [truth.state(n) for n in kept[1:]]
            open_ = [n for n in kept[1:] if truth.state(n) in ("open", "unconfirmed")]
            pairs = [[kept[kept.index(n) - 1], n] for n in open_]
            return sum(map(truth.left, pairs)) if number == "seconds" else states.count(number)
        n = int(number)
        before = kept[kept.index(n) - 1]
        if what in ("again", "high", "low"):
            return truth.change(before, n)[{"again": 0, "high": 1, "low": 2}[what]]
        runs = f"{len(truth.confirmed(before))}+{len(truth.confirmed(n))}"
        plain = {"delta": score(n) - (rows[n]["best_before"] or 0.0), "number": n, "runs": runs}
        return plain[what] if what in plain else truth.left([before, n])

    def of_time(*path: str) -> float:
        name = ".".join(p for p in path if p != "share")
        special = {
            "busy": busy,
            "wall": night(),
            "away": max(0.0, night() - busy - idle - seconds["paused"]),
            "idle_share": idle / (worked + idle) if idle else 0.0,
        }
        if name in special:
            return special[name]
        if path[0] == "repeats":
            if path[1] == "leaving changes out":
                return sum(json.loads(s["outcome"])["timings"]["total"] for s in truth.ablated if not s["tainted"])
            purpose = {"further seeds": "verdict", "the best again": "control", "confirming": "confirm"}[path[1]]
            again = [s for s in truth.samples if s["purpose"] == purpose and not s["tainted"] and s["outcome"]]
            return sum(json.loads(s["outcome"])["timings"]["total"] for s in again)
        return seconds[name] / whole if path[-1] == "share" else seconds[name]

    def of_all(number: str, what: str) -> Any:
        r = rows[int(number)]
        if what == "delta":
            return r["val_bpb"] - r["best_before"]
        return truth.took(int(number)) if what == "seconds" else r[what]

    def of_near(number: str, what: str = "", end: str = "") -> Any:
        parent = rows[int(number)]["parent"]
        if what == "again":
            return truth.change(parent, int(number))[{"": 0, "high": 1, "low": 2}[end]]
        if what == "runs":
            return f"{len(truth.confirmed(parent))}+{len(truth.confirmed(int(number)))}"
        return score(int(number)) - rows[int(number)]["best_before"]

    watched = [o for _, o in truth.runs() if o.get("health")]

    def of_machine(what: str, end: str = "") -> float:
        if what == "runs":
            return len(watched)
        if what == "speed":
            often = max(rows, key=lambda n: sum(s["number"] == n for s in truth.samples))
            runs = [json.loads(s["outcome"]) for s in truth.samples if s["number"] == often]
            return [o["tokens"] / o["training_seconds"] for o in (runs[0], runs[-1])][end == "last"]
        name = ("others_cores", "temperature_c", "cpu_mhz_after")[int(what)]
        values = [o["health"][name] for o in watched]
        return {"low": min, "middle": median, "high": max}[end](values)

    def night() -> float:
        began = [datetime.fromisoformat(r["started"]) for r in rows.values() if r["started"]]
        ended = [datetime.fromisoformat(r["finished"]) for r in rows.values() if r["finished"]]
        for s in [*truth.samples, *truth.ablated]:
            ended.append(datetime.fromisoformat(s["created"]))
            total = json.loads(s["outcome"])["timings"]["total"]
            began.append(ended[-1] - timedelta(seconds=total))
        return (max(ended) - min(began)).total_seconds()

    fixed = {name: (lambda value=value: value) for name, value in count.items()}
    return {
        **fixed,
        "best.val_bpb": lambda: score(last),
        "baseline.val_bpb": lambda: score(first),
        "noise.sd": lambda: truth.spread()[0],
        "gain.recorded": lambda: score(last) - score(first),
        "gain.seconds": lambda: truth.left([first, last], holdout=True),
        "gain": of_gain,
        "kept": of_kept,
        "time": of_time,
        "all": of_all,
        "machine": of_machine,
        "near": of_near,
    }


def look_up(table: dict[str, Callable[..., Any]], key: str) -> Any:
    """The longest known beginning of the key, called with the rest of it."""
    parts = key.split(".")
    for cut in range(len(parts), 0, -1):
        if (name := ".".join(parts[:cut])) in table:
            return table[name](*parts[cut:])
    raise AssertionError(f"the page shows {key!r}, and nobody worked it out again")
