"""pause, resume, stop, undo, clean."""

from __future__ import annotations

from pathlib import Path

from console import places
from console.output import Screen
from console.words import bpb, plural, size
from core.errors import UserError

SAYS = {
    "pause": "pauses after the run under way, of which an experiment may take several; go on with: autoresearch resume",
    "resume": "goes on",
    "stop": "ends now; the running experiment is dropped, not counted",
}


def ask_verb(screen: Screen, given: str | None, what: str) -> None:
    """Ask the lab's running process to pause, go on or stop."""
    from console.looking import running_state

    lab = places.find(screen, given)
    state = running_state(lab)
    if state is None:
        raise UserError(f"nothing runs in lab {lab.tag}", places.command("run", lab))
    lab.ask(what)
    screen.document({"lab": places.about(lab), "asked": what, "pid": state["pid"]})
    screen.say(f"{lab.tag} (process {state['pid']}) {SAYS[what]}")
    if what == "stop":
        screen.say(f"go on with: {places.command('run', lab)}")


def undo_verb(screen: Screen, given: str | None, number: int) -> None:
    lab = places.find(screen, given)
    before = lab.best()
    undone = lab.undo(number)
    after = lab.best()
    screen.document({
        "lab": places.about(lab), "undone": undone,
        "best": {"number": after.number, "val_bpb": after.val_bpb} if after else None,
    })  # fmt: skip
    was = f"#{before.number}" if before else "none"
    now = f"#{after.number} at {bpb(after.val_bpb)}" if after else "none: the next run measures a baseline"
    screen.say(
        f"taken back: {plural(len(undone), 'keep')} ({', '.join(f'#{n}' for n in undone)}); best was {was}, is {now}"
    )


def clean_verb(screen: Screen, given: str | None, yes: bool) -> None:
    lab = places.find(screen, given)
    found = lab.clean(dry_run=not yes)
    total = sum(freed for _, freed in found)
    screen.document({
        "lab": places.about(lab), "freed": yes, "bytes": total,
        "items": [{"what": str(what), "bytes": freed} for what, freed in found],
    })  # fmt: skip
    folders: dict[str, list[int]] = {}
    for what, freed in found:
        folders.setdefault(str(Path(what).parent), []).append(freed)
    for folder, sizes in folders.items():
        screen.say(f"  {size(sum(sizes)):>10}  {plural(len(sizes), 'item')} in {folder}")
    if not found:
        screen.say("nothing to free: only the best's weights, the ledger and what the lab needs are kept")
    elif yes:
        screen.say(f"freed {size(total)}")
    else:
        screen.say(f"{size(total)} can be freed: autoresearch clean --yes")
