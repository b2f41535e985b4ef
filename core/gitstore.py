"""Git as a store of objects and refs, and nothing else: no hook, filter, alias, attribute or user setting acts.

Only plumbing is called (hash-object, commit-tree, update-ref, cat-file, for-each-ref, merge-file, ...), through
GitPython. Porcelain such as `index.commit` runs planted hooks. What lies in the lab's `.git/config` is outvoted by
`-c` or never looked at by these commands.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from git.cmd import Git

from core import trees
from core.errors import LabError
from core.files import replace_file, replace_open

ZERO = "0" * 40  # as an old value: the ref must not exist yet; as a new value: delete it
FULL = 2**16  # bytes; with less room a failure of git is taken for a full disk
AS_THEY_ARE = b"* -text"  # line of .git/info/attributes, which outvotes every other file of attributes
IDENTITY = ("autoresearch", "autoresearch@localhost")

# Command-line settings outvote every file. Each either switches off something that would run a program or
# weaken what is on disk, or fixes something that decides an object's bytes.
_CONFIG = {
    "core.hooksPath": os.devnull,  # reference-transaction would run at each update-ref
    "core.fsync": "all",
    "core.fsyncMethod": "fsync",
    "core.autocrlf": "false",
    "core.attributesFile": os.devnull,
    "core.excludesFile": os.devnull,
    "core.fsmonitor": "false",
    "core.alternateRefsCommand": "",
    "core.logAllRefUpdates": "true",
    "commit.gpgSign": "false",
    "tag.gpgSign": "false",
    "i18n.commitEncoding": "UTF-8",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "protocol.allow": "never",  # no planted promisor remote is asked for a missing object
    "safe.directory": "*",
}


class GitError(LabError):
    """Git could not do what was asked; says which command and what git answered."""


@dataclass(frozen=True)
class Commit:
    sha: str
    tree: str
    parents: tuple[str, ...]


class GitStore:
    """One repository: `<worktree>/.git`. Never looks at the work tree or at the index."""

    def __init__(self, worktree: Path) -> None:
        self.path = worktree / ".git"
        self._git = Git(str(self.path))
        self._git.update_environment(**_environment(self.path))

    @classmethod
    def create(cls, worktree: Path, branch: str) -> GitStore:
        """A new repository in an existing folder, HEAD on `branch`, which has no commit yet.

        In a repository that has lost files the missing ones are made, as `git init` does.
        """
        (worktree / ".git").mkdir(exist_ok=True)
        store = cls(worktree)
        store._run("init", "--quiet", "--template=", "--object-format=sha1", f"--initial-branch={branch}")
        store._run("config", "--local", "core.bare", "false")
        store.keep_bytes()
        return store

    def keep_bytes(self) -> None:
        """Also the user's own `git checkout` writes the bytes that were committed. Git for Windows would end lines with
        CRLF, and train.py would differ from the best for good."""
        setting = ("config", "--local", "core.autocrlf")
        if self._call(*setting)[1].strip() != b"false":
            self._run("config", "--local", "--replace-all", "core.autocrlf", "false")
        file = self.path / "info" / "attributes"
        lines = file.read_bytes().splitlines() if file.is_file() else []
        if AS_THEY_ARE not in lines:
            replace_file(file, b"\n".join([*lines, AS_THEY_ARE, b""]))  # the last line that matches counts

    # --- objects ---------------------------------------------------------------------------------

    def blob(self, content: bytes) -> str:
        return self._text("hash-object", "-w", "-t", "blob", "--stdin", "--no-filters", stdin=content)

    def tree(self, files: Mapping[str, str]) -> str:
        """`files`: name -> blob, all in one folder.

        Not by `git mktree`: it reads no settings, core.fsync neither, and leaves the tree unsynced (git 2.39).
        """
        entries = (b"100644 %s\0" % name.encode() + bytes.fromhex(sha) for name, sha in sorted(files.items()))
        return self._text("hash-object", "-w", "-t", "tree", "--stdin", stdin=b"".join(entries))

    def commit(self, tree: str, parents: Sequence[str], message: str, when: str) -> str:
        """Equal arguments give the equal commit: `when` is its date ("2026-01-31T12:00:00+00:00")."""
        linked = [argument for parent in parents for argument in ("-p", parent)]
        dates = {"GIT_AUTHOR_DATE": when, "GIT_COMMITTER_DATE": when}
        return self._text("commit-tree", "--no-gpg-sign", *linked, tree, stdin=message.encode(), env=dates)

    def read(self, sha: str) -> bytes:
        return self._run("cat-file", "blob", sha)

    def has(self, sha: str) -> bool:
        """Is the object there, with all that a commit needs to be shown (its tree)?"""
        suffix = "^{tree}" if self._exists(f"{sha}^{{commit}}") else ""
        return self._exists(sha + suffix)

    def missing(self, shas: Sequence[str]) -> set[str]:
        """Those of the objects that are not there."""
        if not shas:
            return set()
        out = self._text("cat-file", "--batch-check=%(objectname)", stdin="".join(f"{s}\n" for s in shas).encode())
        return {line.split()[0] for line in out.splitlines() if line.endswith(" missing")}

    def is_whole(self) -> bool:
        """Are the files there without which git does not see a repository?"""
        return all((self.path / name).exists() for name in ("HEAD", "objects", "refs"))

    def read_commit(self, sha: str) -> Commit:
        header = self._run("cat-file", "commit", sha).partition(b"\n\n")[0].decode(errors="replace")
        pairs = [line.split(" ", 1) for line in header.splitlines() if " " in line]
        trees = [value for key, value in pairs if key == "tree"]
        return Commit(sha, trees[0], tuple(value for key, value in pairs if key == "parent"))

    def first_parents(self, ref: str) -> list[str]:
        """Commits from `ref` back to the first, newest first."""
        return self._text("rev-list", "--first-parent", ref).split()

    def merge(self, base: bytes, ours: bytes, theirs: bytes) -> bytes | None:
        """What `ours` changed of `base`, made to `theirs` instead, by `git merge-file`; None where both changed the
        same lines, or neighbouring ones, and where git sees no text."""
        if any(b"\0" in content for content in (base, ours, theirs)):  # git takes it for no text
            return None
        with tempfile.TemporaryDirectory(prefix="autoresearch-") as folder:
            files = [Path(folder, name) for name in ("theirs", "base", "ours")]
            for file, content in zip(files, (theirs, base, ours), strict=True):
                file.write_bytes(content)
            code, out, err = self._call("merge-file", "-p", "-q", *map(str, files))
        if code in range(1, 128):  # the number of conflicts
            return None
        if code:
            raise _explain("merge-file", err, self.path)
        return out

    # --- refs ------------------------------------------------------------------------------------

    def refs(self, *prefixes: str) -> dict[str, str]:
        """Ref -> object, under the prefixes. A ref whose file is damaged is left out: it has to be set again."""
        out = self._text("for-each-ref", "--format=%(refname) %(objectname)", *prefixes)
        pairs = (line.split(" ", 1) for line in out.splitlines())
        return {name: sha for name, sha in pairs if sha != ZERO}

    def update_refs(self, updates: Mapping[str, str]) -> None:
        """Set all of these refs, or none of them. On disk before it returns. What a git that was killed meanwhile has
        left locked is unlocked: a night does not end by it."""
        for name in updates:
            self._discard_damaged(name)
        lines = "".join(f"update {name}\0{sha}\0\0" for name, sha in updates.items()).encode()
        command = ("update-ref", "--no-deref", "-m", "autoresearch", "--stdin", "-z")
        try:
            self._run(*command, stdin=lines)
        except GitError:
            self.clear_stale_locks(list(updates))
            self._run(*command, stdin=lines)

    def is_branch_name(self, name: str) -> bool:
        """Would git take it for a new branch?"""
        return not name.startswith("-") and self._call("check-ref-format", f"refs/heads/{name}")[0] == 0

    def delete_ref(self, name: str) -> None:
        self._run("update-ref", "--no-deref", "-d", name)

    def point_head(self, branch: str) -> None:
        """HEAD -> the branch, so that a user's plain `git log` shows the improvements."""
        self._run("symbolic-ref", "HEAD", f"refs/heads/{branch}")

    def head(self) -> str:
        try:
            return self._text("symbolic-ref", "--quiet", "HEAD")
        except GitError:
            return ""  # detached

    def reset_index(self, commit: str) -> None:
        """Make the index show `commit`, so that a user's `git status` tells the truth.

        Written beside and renamed: no `index.lock` is taken, so that a stale one does not matter.
        """
        fresh = self.path / "index.autoresearch"
        for left in (fresh, fresh.with_name(f"{fresh.name}.lock")):  # of a git that was killed
            left.unlink(missing_ok=True)
        self._run("read-tree", commit, env={"GIT_INDEX_FILE": str(fresh)})
        replace_open(fresh, self.path / "index")

    def clear_stale_locks(self, prefixes: Sequence[str], patience: float = 1.5) -> list[str]:
        """Remove the `.lock` files of refs under `prefixes` that no living git holds. The caller holds the lab's lock.

        A git of ours that outlives its killed parent ends within milliseconds, and so does any other that holds a
        ref: `patience` (seconds) is for them. Then a lock is stale.
        """
        give_up = time.monotonic() + patience
        while self._git_is_running(self.path) or (self._locks(prefixes) and self._git_is_running(self.path.parent)):
            if time.monotonic() >= give_up:
                break
            time.sleep(0.05)
        found = self._locks(prefixes)
        for lock in found:
            lock.unlink(missing_ok=True)
        return [str(lock.relative_to(self.path)) for lock in found]

    def _locks(self, prefixes: Sequence[str]) -> list[Path]:
        """Ends of refs are no folders' names, so that a prefix is a ref of its own or a folder of refs."""
        found = [self.path / f"{name}.lock" for name in ("HEAD", "packed-refs", "config")]
        for prefix in prefixes:
            place = self.path / prefix
            found += place.rglob("*.lock") if place.is_dir() else [place.with_name(f"{place.name}.lock")]
        return [lock for lock in found if lock.is_file()]

    # --- running git -----------------------------------------------------------------------------

    def _git_is_running(self, where: Path) -> bool:
        """Does any git of this machine run in this folder? Ours run in the repository, a user's in the work tree."""
        wanted = os.path.normcase(where)
        for process in psutil.process_iter():
            with suppress(*trees.UNTOLD):  # it has ended, or tells us nothing
                if process.name().startswith("git") and os.path.normcase(process.cwd()) == wanted:
                    return True
        return False

    def _discard_damaged(self, name: str) -> None:
        """A power cut can leave an empty ref file, which git refuses to update; the ledger knows its value."""
        file = self.path / name
        if file.is_file() and not file.read_bytes().strip(b"\0\n "):
            file.unlink()

    def _exists(self, expression: str) -> bool:
        try:
            self._run("cat-file", "-e", expression)
        except GitError:
            return False
        return True

    def _text(self, *arguments: str, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> str:
        return self._run(*arguments, stdin=stdin, env=env).decode(errors="surrogateescape").strip()

    def _run(self, *arguments: str, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> bytes:
        code, out, err = self._call(*arguments, stdin=stdin, env=env)
        if code:
            raise _explain(arguments[0], err, self.path)
        return out

    def _call(
        self, *arguments: str, stdin: bytes = b"", env: Mapping[str, str] | None = None
    ) -> tuple[int, bytes, str]:
        """Exit status, output, and what git said of errors."""
        settings = [part for key, value in _CONFIG.items() for part in ("-c", f"{key}={value}")]
        command = [Git.GIT_PYTHON_GIT_EXECUTABLE or "git", "--no-pager", *settings, *arguments]
        process = self._git.execute(command, istream=subprocess.PIPE, as_process=True, env=dict(env or {}))
        out, err = process.communicate(stdin)  # type: ignore[union-attr]
        return int(process.returncode), bytes(out), err.decode(errors="replace").strip()  # type: ignore[union-attr]


def _environment(git_dir: Path) -> dict[str, str]:
    """Every variable by which git could be led elsewhere, set to what it has to be.

    GitPython cannot take variables of the caller away (a git hook that starts us has GIT_DIR set), so each is given.
    """
    name, mail = IDENTITY
    return {
        "GIT_DIR": str(git_dir),
        "GIT_COMMON_DIR": str(git_dir),
        "GIT_OBJECT_DIRECTORY": str(git_dir / "objects"),
        "GIT_INDEX_FILE": str(git_dir / "index"),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": "",
        "GIT_NAMESPACE": "",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_SYSTEM": os.devnull,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_COUNT": "0",
        "GIT_CONFIG_PARAMETERS": "",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_NO_REPLACE_OBJECTS": "1",  # a planted refs/replace would swap what is read
        "GIT_GRAFT_FILE": os.devnull,
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_TRACE": "0",
        "GIT_AUTHOR_NAME": name,
        "GIT_AUTHOR_EMAIL": mail,
        "GIT_COMMITTER_NAME": name,
        "GIT_COMMITTER_EMAIL": mail,
    }


def _explain(command: str, stderr: str, path: Path) -> GitError | OSError:
    """Git's answer as an error of ours; a full or read-only disk becomes the OSError that it is."""
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):
        if os.strerror(number) in stderr:
            return OSError(number, os.strerror(number), str(path))
    if "insufficient permission" in stderr:
        return OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    if "Out of diskspace" in stderr or shutil.disk_usage(path).free < FULL:  # git does not always say why
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    last = stderr.splitlines()[-1] if stderr else "no message"
    return GitError(f"git {command} failed in {path}: {last}", "see `git fsck` there; the ledger holds every recipe")
