"""The referee: runs one experiment in sandboxed children and believes none of them alone (design, section 4).

    trainer   warm-up on random tokens; then, on the referee's clock, builds again and trains; hands over its weights
              (where what is compiled is found again on disk, the warm-up is a process of its own, which ends first)
    scorer    builds afresh, loads these weights, gives the loss of every validation target
    auditor   builds afresh, loads the same weights, gives logits at positions behind which nothing true stands

Where looks on the way are wanted (`Request.probe`), a *prober* scores the weights so far while the trainer's processes
are stopped (core/pausing.py). The recipe never computes in two of them at once. The processes of prober, scorer and
auditor are started together with the trainer (but see `_roles`), as forks of one that has loaded the backend's library
where that can be (core/forking.py), else so that loading it overlaps; they get the recipe when it is their turn.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from core import caches, cardfaults, files, freezing, gpuwatch, guard, interruptions, scoring
from core import weights as weight_files
from core.child import LOG_LINES, SMALLER, BackendFailed, Ended, OutOfMemory, Place, Worker
from core.errors import DeviceFull
from core.health import Watch
from core.outcome import Event, Outcome, Request, Sharing, Status, ignore, printable, source_sha256
from core.pausing import Prober
from core.sandbox import abilities
from core.settings import Settings
from core.trainer import Trainer, plain
from core.versions import versions

T = TypeVar("T")
__all__ = ["Event", "Outcome", "Request", "Status", "dry_build", "execute", "ignore", "measure", "sample"]

REHEARSED = ("mlx",)  # backends whose trainer finds what a warm-up in another process has compiled
LOOKS = 4  # at the card during the shortest timing
AGAIN = 3  # times that a scoring, or an audit, that others broke off is done again, once the recipe was in it
EAGER = ("cuda", "rtx")  # backends on which torch.compile does nothing where a recipe is only tried out


def execute(
    request: Request,
    on_event: Callable[[Event], None] = ignore,
    stop: threading.Event | None = None,
    sharing: Sharing | None = None,
) -> Outcome:
    """One experiment, from the bytes of `train.py` to a score or the reason why there is none.

    Whatever the recipe does ends in an `Outcome`; a `UserError` means that the data or the sandbox is not in order.
    `stop` ends it within a second or two, with status "stopped". Afterwards no process and no scratch folder is left.
    `sharing`: of a device that others use too, where what is trained is not lost if they take it then; `DeviceFull`
    where they had it before, or do not leave it.
    """
    request.workdir.mkdir(parents=True, exist_ok=True)
    run = _Experiment(request, on_event, stop or threading.Event(), sharing)
    try:
        run.go()
    except Ended as end:
        run.outcome.status, run.outcome.reason = end.status, run.told(end)
        own_limit = any(worker.child.exceeded() for worker in run.workers.values())
        run.outcome.out_of_memory = isinstance(end, OutOfMemory) and not own_limit
        run.outcome.val_bpb, run.outcome.weights = None, None
    finally:
        run.close()
    return run.outcome


class _Experiment:
    """The state of one `execute`."""

    def __init__(
        self, request: Request, on_event: Callable[[Event], None], stop: threading.Event, sharing: Sharing | None
    ) -> None:
        self.request = request
        self.sharing = sharing
        self.settings = request.settings
        self.place = Place(request.settings, request.workdir, stop, forked=True)
        self.on_event = on_event
        self.outcome = Outcome(source_sha256=source_sha256(request.source))
        self.workers: dict[str, Worker] = {}
        self.rng = np.random.default_rng()  # from the system's entropy: no recipe can foresee order or positions
        self.compiled = request.caches
        self.peak_flops = 0.0
        self.started = self.mark = time.monotonic()
        self.clocks = interruptions.read_clocks()
        self.weights = -1  # descriptor
        self.waited = 0.0  # seconds, for a device that others took when the training was done
        self.slept_waiting = 0.0  # of the machine, while nothing ran
        self.shown: dict[scoring.Part, scoring.Text] = {}  # what a scorer has seen of, in batches of what size

    def go(self) -> None:
        self._lint()
        _ = self.place.forkserver  # loads while the text is read
        texts = [scoring.Text.of(self.request.dataset, self.place, part) for part in self._parts()]
        self.outcome.versions = versions(self.settings)
        self.outcome.sandbox = {"abilities": abilities().to_dict()}
        self.phase("start")
        for role in self._roles():
            self.workers[role] = Worker(role, self.place)
        prober = self._prober()
        trainer = Trainer(self, self.workers["trainer"], self.workers.get("warm-up"), prober)
        trainer.warm_up()
        for worker in self.workers.values():
            worker.get_ready()  # what still loads would take processor time from the training
        self.lap("warmup")
        trainer.train()
        self.weights = trainer.hand_over()
        digest = weight_files.file_digest(self.weights)
        self.lap("handover")
        score, *holdout = [self._judge(text) for text in texts]
        if weight_files.file_digest(self.weights) != digest:
            raise Ended("invalid", "the weights were changed while they were scored")
        os.close(self.weights)  # Windows moves no open file
        self.weights = -1
        kept = self.request.workdir / "weights.safetensors"
        files.replace_open(trainer.weights_file, kept)
        self.outcome.status, self.outcome.val_bpb, self.outcome.weights = "scored", score.bpb, kept
        self.outcome.holdout_bpb = holdout[0].bpb if holdout else None

    def _parts(self) -> list[scoring.Part]:
        return ["val", "holdout"] if self.request.holdout else ["val"]

    def _roles(self) -> list[str]:
        """Of the processes that are started before the training.

        On Windows loading torch for a card commits gigabytes in each process, and what is committed cannot exceed
        memory and page file: with three at once a machine of 16 GB fails to load them. There scorer and auditor begin
        when the trainer has gone, which costs the seconds in which they load; one that is not needed never does."""
        roles = ["warm-up", "trainer"] if self.settings.backend in REHEARSED else ["trainer"]
        if sys.platform == "win32" and self.settings.device.startswith("cuda"):
            return roles
        return [*roles, "scorer"] if self.request.audit == "never" else [*roles, "scorer", "auditor"]

    def _prober(self) -> Prober | None:
        if self.request.probe is None or not freezing.possible():  # its lab was told so once, when it was made
            return None
        prober = Prober(self.request, self.place, self.outcome, lambda: self.compiled)
        self.workers |= prober.workers
        return prober

    def told(self, end: Ended) -> str:
        """Its reason, with what to do where it does not say so."""
        if isinstance(end, (OutOfMemory, scoring.OutOfMemoryLate)):
            action = SMALLER if self.weights < 0 else "use a smaller model"  # how it is scored is not the recipe's
        else:
            action = cardfaults.next_action(end.reason) if end.status == "crash" else ""
        return end.reason if not action or SMALLER in end.reason else f"{end.reason}; {action}"

    def close(self) -> None:
        """End every process, keep the last lines of their logs, remove what they wrote."""
        tails = []
        try:
            for role, worker in self.workers.items():
                worker.kill()
                tail = worker.child.log_tail(LOG_LINES).strip()
                if tail:
                    tails.append(tail if role in ("warm-up", "trainer") else f"[{role}]\n{tail}")
                self.outcome.sandbox[role] = worker.child.enforced
                worker.close()
        finally:
            printed = self.place.close()
        if printed:
            tails.insert(0, f"[library]\n{printed}")
        if self.weights >= 0:
            os.close(self.weights)
        self.outcome.log_tail = printable("\n".join("\n".join(tails).splitlines()[-LOG_LINES:]))
        self.outcome.timings["total"] = round(time.monotonic() - self.started - self.waited, 3)
        slept = interruptions.slept(self.clocks, interruptions.read_clocks()) - self.slept_waiting
        if slept > self.outcome.health.get("slept_seconds", 0.0):  # not in the training alone
            self.outcome.health["slept_seconds"] = slept

    # --- phases ------------------------------------------------------------------------------------

    def _lint(self) -> None:
        """The lint may be switched off; the bounds on size hold always, as they limit what can be smuggled in."""
        source = self.request.source
        findings = guard.check(source) if self.request.lint else guard.limits(source)
        if findings:
            raise Ended("invalid", str(guard.GuardError(findings)))

    def _judge(self, text: scoring.Text) -> scoring.Score:
        """Score, and audit where that is wanted, at equal shapes. An auditor that runs out of memory has seen the
        questions, so it is not asked others: its end is the experiment's, or it is asked the same again.

        The holdout has a scorer and an auditor of its own, which have seen no other text, and is always audited."""
        if text.part == "holdout":
            for role in ("scorer", "auditor"):
                self._anew(role)
        order, questions = self.rng.integers(2**63, size=2)
        text, score = self._beside_others("scorer", lambda: self._score_in_memory(text, order))
        if text.part == "holdout" or self._wants_audit(score.bpb):
            self._beside_others("auditor", lambda: self._audit(text, score, questions))
        return score

    def _beside_others(self, role: str, work: Callable[[], T]) -> T:
        """The result of `work`, done again in a new process of `role` where it failed because others had taken the
        device, or because its driver had lost it; the weights are the same, and nothing is trained again.

        That it was so the referee sees for itself, with nothing of the recipe alive: a child that says that
        memory ended, or lets its time pass, gains nothing by that alone. Where it was, it is asked the very same
        again: rows in the same order, of the same batches once a row was shown, the same questions; and AGAIN times at
        most. How long it took says nothing of the weights, so such a score is as good as any: `tainted` is what the
        training was."""
        failed = 0
        while True:
            try:
                return work()
            except (DeviceFull, BackendFailed, Ended) as end:
                failed += isinstance(end, Ended)
                excuse = self._excuse(role, end) if failed <= AGAIN else None
                if excuse is None or not self._wait_for_device(role, *excuse):
                    raise

    def _excuse(self, role: str, end: DeviceFull | BackendFailed | Ended) -> tuple[str, Callable[[str], bool]] | None:
        """Why a scorer or an auditor failed by no fault of its own, and how that is waited for; None where it is not
        known to be so. What fails before the recipe is there is waited for as long as there is time."""
        sharing, worker = self.sharing, self.workers.get(role)
        if sharing is None or (isinstance(end, Ended) and end.status not in ("crash", "timeout")):
            return None
        if isinstance(end, DeviceFull):
            return end.fact, lambda why: sharing.wait(why, end.needed)
        own_limit = worker is not None and worker.child.exceeded()
        if worker is not None:
            worker.kill()
        if isinstance(end, BackendFailed):
            lost = sharing.lost(f"{end.fact} {end.action}")
            return (lost, sharing.wait_for_answer) if lost else None
        if own_limit:
            return None
        memory = isinstance(end, (OutOfMemory, scoring.OutOfMemoryLate))
        taken = sharing.taken(self.outcome.peak_memory) if memory or end.status == "timeout" else ""
        why = taken or sharing.lost()
        wait = sharing.wait if taken else sharing.wait_for_answer
        return (f"{end.reason[:300]}, while {why}", wait) if why else None

    def _wait_for_device(self, role: str, why: str, wait: Callable[[str], bool]) -> bool:
        """Whether it is ours again; then a new process of the role begins."""
        if self.sharing is None:
            return False
        if role in self.workers:
            self.workers[role].close()
        before, clocks = self.sharing.waited, interruptions.read_clocks()
        free = wait(printable(why))
        self.slept_waiting += interruptions.slept(clocks, interruptions.read_clocks())
        waited = self.sharing.waited - before
        self.waited, self.mark = self.waited + waited, self.mark + waited
        self.place.look_for_stop()
        if free:
            self.outcome.health.setdefault("judged_again", []).append(printable(f"{role}: {why}"))
            self.place.look_again()
            self._anew(role)
        return free

    def _worker(self, role: str) -> Worker:
        """The process of this role, started now where it was not before the training."""
        if role not in self.workers:
            self.workers[role] = Worker(role, self.place)
        return self.workers[role]

    def _anew(self, role: str) -> None:
        """A new process in the place of one that was used."""
        if role in self.workers:
            self.workers[role].close()  # first, as it holds memory
        self.workers[role] = Worker(role, self.place)

    def _score_in_memory(self, text: scoring.Text, order: int) -> tuple[scoring.Text, scoring.Score]:
        """The score, with half of the rows in a batch where memory ends before any text was shown, in a new process."""
        if text.part == "val" and text.part not in self.shown:
            self.outcome.describe.pop("scored_rows_reason", None)  # of a try beside others, who have gone
        text = self.shown.get(text.part, text)
        while True:
            self.outcome.describe["scored_rows"] = text.size
            try:
                return text, self._score(text, order)
            except OutOfMemory as end:
                if text.size == 1 or text.part in self.shown:
                    raise
                text = text.halved()
                why = f"{end.reason[:300]}; scored again with {text.size} rows at a time"
                self.outcome.describe["scored_rows_reason"] = printable(why)
                self._anew("scorer")

    def _score(self, text: scoring.Text, order: int) -> scoring.Score:
        """`order`: the seed of that of the rows."""
        self.phase("score" if text.part == "val" else "score the holdout")
        worker = self._worker("scorer")
        self._begin(worker, text)
        scoring.give_weights(worker, self.weights)
        seconds = scoring.limit(self.place)
        rng = np.random.default_rng(order)
        scoring.fill_memory(worker, text, seconds, rng)
        self.shown[text.part] = text
        score = scoring.score(worker, text, seconds, rng)
        worker.close()
        if text.part == "val":
            self.outcome.scored_tokens, self.outcome.total_bytes = score.tokens, score.total_bytes
            self.outcome.total_nats = score.total_nats
        self.lap("scoring" if text.part == "val" else "holdout scoring")
        return score

    def _audit(self, text: scoring.Text, score: scoring.Score, questions: int) -> None:
        """`questions`: the seed of where is asked."""
        self.phase("audit" if text.part == "val" else "audit of the holdout")
        worker = self._worker("auditor")
        self._begin(worker, text)
        seconds = scoring.limit(self.place)
        rng = np.random.default_rng(questions)
        facts = scoring.audit(worker, text, self.weights, score, seconds, rng)
        worker.close()
        if text.part == "val":
            self.outcome.audit, self.outcome.audited = facts, True
        else:
            self.outcome.audit["holdout"] = facts
        self.lap("audit" if text.part == "val" else "holdout audit")

    def _begin(self, worker: Worker, text: scoring.Text) -> None:
        """Build in a scorer or auditor; what it compiled is copied before it sees any weight."""
        warm = bool(self.outcome.describe.get("compiled"))
        worker.begin(self.request.source, self.request.seed, self.compiled, warm=warm, rows=text.size)
        if scoring.prepare(worker, worker.role):
            self.keep_caches(worker)

    def keep_caches(self, worker: Worker) -> None:
        """Copy what the child has compiled so far; it has seen no text yet, and it waits for us."""
        if caches.is_empty(worker.caches):
            return
        target = self.request.workdir / f"caches-{worker.role}"
        if target == self.outcome.caches:  # of a scorer that was started again, and had a copy of these
            files.remove(target)
            self.outcome.caches = None
        caches.copy(worker.caches, target)
        if self.outcome.caches is not None:  # an earlier child's, of which this one had a copy
            files.remove(self.outcome.caches)
        self.compiled = self.outcome.caches = target

    def _wants_audit(self, bpb: float) -> bool:
        wish = self.request.audit
        return wish == "always" or (wish == "auto" and self.request.would_keep(bpb))

    def tell(self, event: Event) -> None:
        self.on_event(event)

    def phase(self, name: str) -> None:
        self.on_event(Event("phase", {"phase": name, "experiment": self.request.experiment}))

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.outcome.timings[name] = round(now - self.mark, 3)
        self.mark = now


# --- smaller questions ---------------------------------------------------------------------------------


def measure(
    source: bytes,
    settings: Settings,
    workdir: Path,
    *,
    seconds: float = 3.0,
    stop: threading.Event | None = None,
    compiled: Path | None = None,
) -> dict[str, Any]:
    """How fast a recipe trains here: seconds_per_step, tokens_per_step, steps, warmup, compiled, params, peak_memory,
    peak_flops, peak_source, describe, health (of `core.health.Watch`). Random tokens, no data. `RecipeFailed` when it
    does not get that far. `compiled`: a folder of compile caches to start from, to which what it compiles is added."""
    place = Place(settings, workdir, stop or threading.Event())
    return _ask(source, place, "measure", "measured", compiled, seconds=seconds, watched=True)


def dry_build(
    source: bytes,
    settings: Settings,
    workdir: Path,
    *,
    nice: int = 0,
    stop: threading.Event | None = None,
    caches: Path | None = None,
) -> dict[str, Any]:
    """Whether a recipe runs at all: import, build, one step, logits, weights there and back. loss, params, describe.
    `caches`: compile caches to start from; copied, never written."""
    eager = {"TORCHDYNAMO_DISABLE": "1"} if settings.backend in EAGER else {}
    place = Place(settings, workdir, stop or threading.Event(), nice, eager)
    return _ask(source, place, "dry", "tried", caches)


class RecipeFailed(Exception):
    """A recipe that was tried out did not run: the status that an experiment would have had, reason, log."""

    def __init__(self, end: Ended, log_tail: str, own_limit: bool = False) -> None:
        """`own_limit`: it was ended for what it alone took."""
        self.status = end.status
        self.reason = end.reason
        self.out_of_memory = isinstance(end, OutOfMemory) and not own_limit
        self.log_tail = log_tail
        super().__init__(end.reason)


def _ask(
    source: bytes,
    place: Place,
    role: str,
    answer: str,
    compiled: Path | None,
    seconds: float = 0.0,
    watched: bool = False,
) -> dict[str, Any]:
    """The child's answer. `watched`: it says when it is warm, and from then on the card is looked at; before that our
    own part of its memory grows. What such a child compiles is added to `compiled`: it waits meanwhile."""
    settings = place.settings
    place.workdir.mkdir(parents=True, exist_ok=True)
    worker = Worker(role, place)
    try:
        worker.begin(source, settings.seed, compiled if compiled and compiled.is_dir() else None, seconds=seconds)
        if watched:
            worker.expect("warm", settings.warmup_cap + 30.0, "import, build and warm-up")
        every = min(gpuwatch.EVERY, seconds / LOOKS) if watched else gpuwatch.EVERY
        watch = Watch(worker.child.pid, settings.device if watched else "", every=every)
        message = worker.expect(answer, settings.warmup_cap + 30.0, "import, build and steps")
        found = {k: v for k, v in message.fields.items() if k not in ("describe", "health")}
        found |= {"describe": plain(message), "health": watch.report()}
        if watched and compiled is not None and not caches.is_empty(worker.caches):
            caches.copy(worker.caches, compiled)
        return found
    except Ended as end:
        raise _failed(end, worker) from None
    finally:
        worker.close()


def _failed(end: Ended, worker: Worker) -> RecipeFailed:
    """The child is ended first: what it printed last may still be on its way when it has said that it failed."""
    worker.kill()
    return RecipeFailed(end, worker.child.log_tail(LOG_LINES), own_limit=worker.child.exceeded() is not None)


def sample(
    source: bytes,
    weights: Path,
    settings: Settings,
    tokens: list[int],
    max_new: int,
    temperature: float,
    seed: int,
    workdir: Path,
    stop: threading.Event | None = None,
) -> Iterator[int]:
    """Continue `tokens`, one token after another; temperature 0 takes the likeliest. `RecipeFailed` when it cannot."""
    workdir.mkdir(parents=True, exist_ok=True)
    place = Place(settings, workdir, stop or threading.Event())
    worker = Worker("scorer", place)
    random = np.random.default_rng(seed)
    length = settings.sequence_len
    fd = os.open(weights, os.O_RDONLY)
    try:
        worker.begin(source, settings.seed, None, warm=False, rows=1)
        scoring.prepare(worker, "sampling")
        scoring.give_weights(worker, fd)
        text = list(tokens) or [settings.bos_id]
        for _ in range(max_new):
            window = text[-length:]
            row = np.full((1, length), settings.bos_id, np.int32)
            row[0, : len(window)] = window
            worker.send("logits", arrays={"tokens": row, "positions": np.array([len(window) - 1])})
            message = worker.expect("answered", settings.warmup_cap, "logits()", 4 * settings.vocab_size)
            text.append(_draw(message.array("logits", "<f4", (1, settings.vocab_size))[0], temperature, random))
            yield text[-1]
    except Ended as end:
        raise _failed(end, worker) from None
    finally:
        os.close(fd)
        worker.close()


def _draw(logits: np.ndarray, temperature: float, random: np.random.Generator) -> int:
    if temperature <= 0:
        return int(np.nanargmax(logits))
    x = np.nan_to_num(logits.astype(np.float64)) / temperature
    p = np.exp(x - x.max())
    return int(random.choice(len(p), p=p / p.sum()))
