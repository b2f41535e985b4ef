"""The keyboard and the terminal while a line is redrawn, in a real pseudo-terminal: echo, keys, what is left behind."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from console import words
from console.display import Ticker
from console.output import Screen

ROOT = Path(__file__).resolve().parent.parent
posix = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
# The shell of the terminal: it stays when the program ends, and then says how the terminal is.
SHELL = """
import fcntl, signal, struct, subprocess, sys, termios
signal.signal(signal.SIGINT, lambda *_: None)
status = subprocess.call([sys.executable, "-c", sys.argv[1]])
echoes = bool(termios.tcgetattr(0)[3] & termios.ECHO)
now = termios.tcgetattr(0)
now[3] &= ~termios.ICANON  # else the kernel counts whole lines only
termios.tcsetattr(0, termios.TCSANOW, now)
left = struct.unpack("i", fcntl.ioctl(0, termios.FIONREAD, b"    "))[0]
print(f"status={status} echo={echoes} left={left}", flush=True)
"""
PROGRAM = """
import sys, time
from console.display import Ticker
from console.output import Screen
from console.signals import ends
over = []
def on_key(key):
    ticker.say(f"<key {key!r}>")
    over.append(key) if key == "q" else None
with Ticker(Screen()) as ticker:
    ticker.listen(on_key, lambda runs: "[q] end")
    ticker.begin("#1", "idea")
    ticker.say("ready")
    while not over:
        time.sleep(0.05)
"""


class Terminal:
    """A program in a terminal of its own, with a shell before and after it."""

    def __init__(self, program: str, columns: int = 80, cwd: Path = ROOT, home: Path | None = None) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self.screen, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "PYTHONIOENCODING": "ascii"}
        env.pop("COLUMNS", None)
        env |= {"AUTORESEARCH_HOME": str(home)} if home else {}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SHELL, program],
            stdin=inner, stdout=inner, stderr=inner, env=env, cwd=cwd, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(inner)
        self.seen = ""

    def until(self, text: str) -> str:
        """All that has been shown by the time that `text` is."""
        limit = time.monotonic() + 60
        while text not in self.seen:
            assert time.monotonic() < limit, self.seen
            if select.select([self.screen], [], [], 0.1)[0]:
                self.seen += os.read(self.screen, 65536).decode()
        return self.seen

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.screen)


@pytest.fixture
def terminal() -> Iterator[type[Terminal]]:
    made: list[Terminal] = []

    class Kept(Terminal):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            made.append(self)

    yield Kept
    for one in made:
        one.close()


@posix
def test_keys_steer_and_nothing_that_is_typed_is_echoed_or_left_for_the_shell(terminal: type[Terminal]) -> None:
    shown = terminal(PROGRAM)
    shown.until("ready")
    shown.type("rm -rf precious\n")  # several at a time: pasted
    shown.until("[q] end")
    time.sleep(0.5)
    shown.type("\x1b[A")
    time.sleep(0.5)
    shown.type("p")
    shown.until("<key 'p'>")
    shown.type("q")
    seen = shown.until("left=")
    assert "status=0 echo=True left=0" in seen
    assert "precious" not in seen and seen.count("<key ") == 2


# Whoever starts the tests by `nohup` or in the background has these ignored, and so have children.
AS_USUAL = "import signal\nfor s in (signal.SIGHUP, signal.SIGQUIT): signal.signal(s, signal.SIG_DFL)\n"


@posix
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGHUP", "SIGQUIT"])
def test_the_terminal_is_as_it_was_however_the_program_ends(terminal: type[Terminal], how: str) -> None:
    end = "" if how == "Ctrl-C" else f"import os, signal; os.kill(os.getpid(), signal.{how})"
    shown = terminal(AS_USUAL + PROGRAM.replace("    while not over:", f"    {end}\n    while not over:"))
    shown.until("ready")
    if not end:
        shown.type("\x03")
    seen = shown.until("left=")
    assert "echo=True" in seen and "status=0" not in seen
    assert "^C" not in seen


@posix
@pytest.mark.parametrize("ignored", [False, True])
def test_a_hangup_asks_for_an_end_unless_nohup_has_it_ignored(ignored: bool) -> None:
    program = ("" if ignored else AS_USUAL) + (
        "import os, signal, sys\nfrom console.signals import ends\nasked_for = []\n"
        "with ends(lambda: asked_for.append(1)) as asked:\n    os.kill(os.getpid(), signal.SIGHUP)\n"
        "print(asked_for, asked.name)"
    )
    argv = [*(["nohup"] if ignored else []), sys.executable, "-c", program]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, cwd=ROOT, check=True)
    assert done.stdout == ("[] \n" if ignored else "[1] SIGHUP\n")


@posix
@pytest.mark.parametrize("columns", [60, 80, 100])
def test_lines_are_broken_between_words_and_the_live_line_fits(terminal: type[Terminal], columns: int) -> None:
    long = "  verdict     statistical: kept is what several seeds show to be better than noise; then it goes on and on"
    said = f"ticker.say({long!r}); ticker.screen.say({long!r}); over.append(1)"
    program = PROGRAM.replace('ticker.say("ready")', said)
    seen = terminal(program, columns).until("left=")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen).replace("\r", "\n")
    assert all(len(line) < columns for line in shown.split("\n"))
    assert " ".join(shown.split()).count(" ".join(long.split())) == 2


def test_without_a_terminal_at_standard_input_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.write(write, b"q")
    keys: list[str] = []
    with os.fdopen(read) as stdin, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        with Ticker(Screen()) as ticker:
            ticker.listen(keys.append, lambda runs: "[q] end")
            ticker.begin("#1")
            assert "[q]" not in "".join(ticker.rows(80))
        assert os.read(read, 10) == b"q"  # it is whoever's comes next
    os.close(write)
    assert keys == []


# --- what fits in a line ---------------------------------------------------------------------------


def test_wrapped_lines_hang_under_their_last_column() -> None:
    line = "  confirm     the last 9 min: baseline and winner again, on fresh seeds, see `autoresearch confirm --kept`"
    assert words.wrapped(line, 58).split("\n") == [
        "  confirm     the last 9 min: baseline and winner again,",
        "              on fresh seeds, see",
        "              `autoresearch confirm --kept`",
    ]
    assert words.wrapped("short\n     note of a run that is somewhat longer", 30).split("\n") == [
        "short", "     note of a run that is", "     somewhat longer",
    ]  # fmt: skip
    path = "/a/very/long/path/that/nobody/could/break/at/any/place/of/it"
    assert path in words.wrapped(f"error: there is no file {path}", 30).split()


@pytest.mark.parametrize("columns", range(40, 130, 7))
def test_a_live_line_fits_and_has_a_bar_from_60_columns_on(columns: int) -> None:
    from core.live import Event

    ticker = Ticker(Screen())
    ticker.begin("#12", "HEAD_DIM 64 -> 32, ASPECT_RATIO 42 -> 54: HEAD_DIM 32 lost once, other step")
    ticker.feed(Event("phase", {"phase": "train"}))
    progress = {"step": 1410, "loss": 4.3, "remaining": 252.0, "fraction": 0.16, "tokens_per_second": 1e4, "mfu": 0.031}
    ticker.feed(Event("progress", progress))
    rows = ticker.rows(columns)
    assert all(len(row) <= columns for row in rows)
    assert ("[##" in rows[0] or "[#" in rows[0]) == (columns >= 60)
    assert "#12" in rows[0]
    if columns >= 80:
        assert "step 1410, loss 4.300" in rows[0] and "4 min 12 s left" in rows[0]
