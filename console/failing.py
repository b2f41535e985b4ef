"""What a person is told when a verb fails: a fact and the next action; a traceback for a bug only."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import click

from console.output import complain


def usage(error: click.UsageError, as_json: bool, verb: str = "") -> int:
    """`verb`: that was called, which an error of the parser's own does not know."""
    if as_json or isinstance(error, click.exceptions.NoArgsIsHelpError):
        if as_json:
            complain("UsageError", error.format_message(), "see --help", True)
        else:
            error.show()
    else:
        where = error.ctx.command_path if error.ctx else f"autoresearch {verb}".rstrip()
        message = error.format_message().rstrip(".")
        complain("UsageError", message, "" if "--help" in message else f"see `{where} --help`", False)
    return error.exit_code


def failed(error: Exception, as_json: bool) -> int:
    """Errors that a user can act on become one line; a bug shows its traceback and says where to report it."""
    from core.errors import UserError  # here, because a page of help loads nothing of core

    if isinstance(error, UserError):
        complain(type(error).__name__, error.fact, error.action, as_json)
    elif _git_fails(error):
        import platform

        from core.doctor import install_git

        complain("UserError", "git was not found, or does not start", install_git(platform.system()), as_json)
    elif isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        complain("OSError", f"{where}{error.strerror}", "check the path, its permissions and free space", as_json)
    else:
        import traceback

        if not as_json:
            traceback.print_exception(error)
        fact = f"a bug in autoresearch: {type(error).__name__}: {error}"
        complain("Bug", fact, "please report it with the file that `autoresearch doctor --bundle` writes", as_json)
    return 1


def reader_gone(error: Exception) -> bool:
    """Whether the program that read our output has ended, as `| select -first 5` does. Windows calls a pipe that nobody
    reads an invalid argument, where others say EPIPE, which click knows. What is still to be written goes nowhere."""
    if sys.platform != "win32" or not isinstance(error, OSError) or error.errno != errno.EINVAL or error.filename:
        return False
    gone = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()  # what could not be written is still in its buffer
        except OSError:
            gone = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    return gone


def _git_fails(error: Exception) -> bool:
    """GitPython runs git when it is imported, and says in an error of its own that there is none."""
    if not (isinstance(error, ImportError) or type(error).__module__.startswith("git.")):
        return False
    try:
        return subprocess.run(["git", "--version"], capture_output=True, timeout=10).returncode != 0
    except (OSError, subprocess.TimeoutExpired):
        return True
