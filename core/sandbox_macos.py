"""macOS: a profile for sandbox-exec from the same rules as on Linux. Written from its documentation, not yet run.

`sandbox-exec` is deprecated but present up to macOS 26; Apple offers nothing else for a plain command.
"""

from __future__ import annotations

from core import landlock
from core.readable import words

# What Metal and the C library ask for; no file or network access by itself.
SERVICES = words(
    "com.apple.MTLCompilerService com.apple.CARenderServer com.apple.PowerManagement.control "
    "com.apple.system.opendirectoryd.libinfo com.apple.system.logger com.apple.system.notification_center"
)


def quoted(path: str) -> str:
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


def allowed(path: str, rights: int) -> list[str]:
    """SBPL clauses for one rule."""
    if rights == landlock.LIST:
        return [f"(allow file-read-data (literal {quoted(path)}))"]
    clauses = [f"(allow file-read* (subpath {quoted(path)}))"]
    if rights & landlock.EXECUTE:
        clauses.append(f"(allow process-exec* file-map-executable (subpath {quoted(path)}))")
    if rights & landlock.WRITE_FILE:
        # what is compiled there is loaded as a library, as on Linux
        clauses.append(f"(allow file-write* file-map-executable (subpath {quoted(path)}))")
    if rights & landlock.IOCTL_DEV:
        clauses.append(f"(allow file-ioctl (subpath {quoted(path)}))")
    return clauses


def profile(rules: list[tuple[str, int]]) -> str:
    """Deny by default; files by `rules`; signals within the sandbox only; Metal; no network."""
    head = [
        "(version 1)",
        "(deny default)",
        "(allow process-fork)",
        "(allow signal (target same-sandbox))",
        "(allow process-info* (target same-sandbox))",
        "(allow sysctl-read)",
        "(allow file-read-metadata)",
        '(allow file-read* (subpath "/usr/lib") (subpath "/System/Library"))',
        '(allow file-read* (subpath "/System/Volumes/Preboot/Cryptexes"))',
        '(allow file-read* file-write-data (literal "/dev/null") (literal "/dev/zero") (literal "/dev/dtracehelper"))',
        '(allow file-read* (literal "/dev/urandom") (literal "/dev/random") (literal "/"))',
        "(allow iokit-open)",
        "(allow mach-lookup " + " ".join(f'(global-name "{name}")' for name in SERVICES) + ")",
        "(deny network*)",
    ]
    return "\n".join(head + [clause for path, rights in rules for clause in allowed(path, rights)])


def missing() -> list[str]:
    return [
        "a process can leave its group on macOS: a recipe's daemon is found by its parent or not at all",
        "memory and number of processes are looked at every 0.1 s, a faster rise can overshoot",
        "the sandbox-exec profile has not been run on a Mac yet",
    ]
