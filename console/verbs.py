"""The verbs of the command line, as its help groups them."""

from __future__ import annotations

SECTIONS = {
    "The three that matter": ["run", "log", "report"],
    "Before": ["doctor", "prepare", "init"],
    "One experiment": ["try", "wait", "train"],
    "Afterwards": ["confirm", "finalize"],
    "Look": ["labs", "status", "best", "show", "diff", "sample"],
    "Compare": ["bench"],
    "For agents": ["kernels", "mcp"],
    "Steer": ["pause", "resume", "stop", "undo", "clean"],
}
VERBS = [name for names in SECTIONS.values() for name in names]
