"""A graphics card that fails: what its driver says of a run that it ended, and of a card that is no longer there."""

from __future__ import annotations

from core import hardware, locks
from core.errors import CardGone, UserError

# As CUDA, Triton, cuBLAS and cuDNN say it, in small letters. An illegal address, an assertion or an unknown instruction
# are not among them: these are a kernel's own, and the same the next time.
SAID = (
    "unspecified launch failure",
    "launch timed out",  # Windows ends a kernel that keeps a display waiting for two seconds
    "cuda error: unknown error",
    "[cuda]: unknown error",
    "uncorrectable ecc error",
    "no cuda-capable device",
    "execution_failed",
)
KERNELS = ("cuda error", "triton error [cuda]")  # what else a card says
DIED = ("ended by itself", "killed by SIGABRT")  # a child that torch ended; its log has the driver's words
LOOK = "see what `nvidia-smi` and the system's log (Xid) say"
RESTART = "restart the machine, then `autoresearch run` goes on: nothing is lost"


def fault(reason: str, log_tail: str) -> str:
    """The driver's words where it ended a run, by the reason of a crash; "" where it did not."""
    text = f"{reason} {log_tail if any(words in reason for words in DIED) else ''}".lower()
    return next((words for words in SAID if words in text), "")


def next_action(reason: str) -> str:
    """What to do after a crash for this reason; "" where it is nothing of a card's."""
    if fault(reason, ""):
        return f"the card's driver ended it: {LOOK}"
    if any(words in reason.lower() for words in KERNELS):
        return "a card tells of a kernel's fault late: look for an index out of range in earlier lines too"
    return ""


def gone(card: str, said: str) -> CardGone:
    """What to raise when the driver no longer tells of `card`. `said`: its words."""
    if "mismatch" in said.lower():
        return CardGone(f"NVIDIA's driver was renewed while it was in use ({said})", RESTART)
    again = "if it is an external card, plug it in again"
    if "unknown error" in said.lower():  # what NVML says in a container after `systemctl daemon-reload` outside of it
        again = "if this is a container, restart it"
    action = f"{again}; else {LOOK}, and {RESTART}"
    return CardGone(f"{card or 'the card'} does not answer any more ({said})", action)


def lost(device: str, said: str) -> CardGone:
    """The same for the card that `device` ("cuda:0") names."""
    index = locks.cuda_index(device)
    return gone("" if index is None else locks.cuda_name(index), said)


def failing(said: str) -> CardGone:
    """What to raise when the card answers and could not be opened. `said`: the driver's words."""
    return CardGone(f"the card's driver failed when the card was opened ({said})", f"{LOOK}, and {RESTART}")


def missing(device: str, card: str) -> UserError | None:
    """Why a lab cannot go on: the driver tells of no card at all. `card`: the name of the one that it ran on, "" for
    none yet. None where there is one, or where `device` is none."""
    if locks.cuda_index(device) is None or (here := hardware.probe()).gpus:
        return None
    if "CUDA_VISIBLE_DEVICES" in here.gpu_problem:
        return UserError(f"this lab runs on an NVIDIA card, and {here.gpu_problem}", "unset CUDA_VISIBLE_DEVICES")
    return gone(card, here.gpu_problem or "the driver tells of no card")
