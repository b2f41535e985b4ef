"""The sandbox for an ordinary user, whose referee has the same uid as the recipe and no capability to lose.

As root the tests become such a user: in a mount namespace of their own, where interpreter, packages and project lie in
places that this user can reach.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_sandbox_cuda import CUINIT, LOWERED, READ

from core import attacks, landlock, paths, readable

USER = 65534
REFEREE = Path(__file__).with_name("sandboxed_referee.py")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Linux's walls"),
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0, reason="an ordinary user runs test_sandbox.py as such"
    ),
]

# Run as root: {target: source} is bound, then the user's command executed.
BECOME = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from core import landlock
orders = json.loads(sys.argv[2])
landlock.unshare(landlock.CLONE_NEWNS)
landlock.mount("none", "/", landlock.MS_REC | landlock.MS_PRIVATE)
for target, source in orders["bound"].items():
    os.makedirs(target, exist_ok=True)
    landlock.check(landlock.libc().mount(source.encode(), target.encode(), None, 0x5000, None), f"bind {source}")
os.setgroups([])
os.setresgid(orders["user"], orders["user"], orders["user"])
os.setresuid(orders["user"], orders["user"], orders["user"])
landlock.libc().prctl(4, 1, 0, 0, 0)
os.chdir(orders["folder"])
os.execve(orders["argv"][0], orders["argv"], orders["env"])
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of the ordinary user, in a place that it can reach."""
    folder = Path(tempfile.mkdtemp(prefix="autoresearch-user-", dir="/tmp"))
    os.chown(folder, USER, USER)
    yield folder
    shutil.rmtree(folder)


def as_user(place: Path, orders: dict[str, Any], secret: str = "") -> dict[str, Any]:
    views = place.parent / f"{place.name}-views"
    packages = [folder for folder in readable.package_folders() if Path(folder).is_dir()]
    bound = {f"{views}/python": sys.base_prefix, f"{views}/project": str(paths.project_root())}
    bound |= {f"{views}/{n}/site-packages": folder for n, folder in enumerate(packages)}
    interpreter = f"{views}/python/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
    script = f"{views}/project/tests/{REFEREE.name}"
    become = {
        "bound": bound,
        "user": USER,
        "folder": str(place),
        "argv": [interpreter, "-B", script, f"{views}/project", json.dumps({**orders, "folder": str(place)}), secret],
        "env": {
            "PATH": "/usr/bin:/bin",
            "HOME": str(place),
            "ANTHROPIC_API_KEY": secret,
            "PYTHONPATH": ":".join(f"{views}/{n}/site-packages" for n in range(len(packages))),
        },
    }
    command = [sys.executable, "-I", "-c", BECOME, str(paths.project_root()), json.dumps(become)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    finally:
        shutil.rmtree(views, ignore_errors=True)
    if "Operation not permitted: 'unshare'" in done.stderr or "unshare: Operation not permitted" in done.stderr:
        pytest.skip("root may not make a mount namespace here")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def able(place: Path) -> dict[str, Any]:
    found = as_user(place, {"do": "abilities"})
    if not found["landlock"] or not found["seccomp"]:
        pytest.skip(f"not on this kernel: {found['missing']}")
    return found


@pytest.mark.parametrize("namespaces", [True, False])
@pytest.mark.parametrize("abi", [99, 5, 1])
def test_attacks_are_refused(namespaces: bool, abi: int, place: Path, able: dict[str, Any]) -> None:
    if namespaces and not able["namespaces"]:
        pytest.skip("namespaces are refused to this user")
    secret = secrets.token_hex(16)
    layers = {"namespaces": namespaces, "landlock": abi}
    said = as_user(place, {"do": "attacks", "secret": secret, "layers": layers}, secret)
    assert said["code"] == 0, said["log"]
    assert said["enforced"]["landlock"] == min(abi, able["landlock"])
    assert said["enforced"]["namespaced"] == namespaces
    results = json.loads(said["log"])
    assert set(results) == set(attacks.ATTACKS)
    assert {attack: how for attack, (held, how) in results.items() if not held} == {}


@pytest.mark.parametrize("namespaces", [True, False])
def test_cuda_can_start_and_attacks_are_refused(namespaces: bool, place: Path, able: dict[str, Any]) -> None:
    if namespaces and not able["namespaces"]:
        pytest.skip("namespaces are refused to this user")
    orders = {"layers": {"namespaces": namespaces}, "backend": "cuda"}
    said = as_user(place, {**orders, "do": "code", "code": f"PATHS = {READ!r}\n{CUINIT}"})
    assert said["code"] == 0 and said["exceeded"] is None, said["log"]
    found = json.loads(said["log"].splitlines()[-1])
    refused = {step for step, how in found.items() if str(how).startswith("refused")}
    assert refused == (set() if namespaces else {"shared memory"})
    lowered = as_user(place, {**orders, "do": "code", "code": LOWERED})
    assert "oom_score_adj was lowered" in (lowered["exceeded"] or "")
    secret = secrets.token_hex(16)
    said = as_user(place, {**orders, "do": "attacks", "secret": secret}, secret)
    results = json.loads(said["log"])
    assert set(results) == set(attacks.ATTACKS)
    assert {a: how for a, (held, how) in results.items() if not held} == {"kernel_calls": "memory file"}


def test_the_referees_environment_is_the_users_to_read_without_landlock(place: Path, able: dict[str, Any]) -> None:
    """The control: what keeps this user's own secrets from the recipe is Landlock (or the pid namespace)."""
    secret = secrets.token_hex(16)
    orders = {"do": "attacks", "attacks": ["all_of_proc"], "secret": secret}
    said = as_user(place, {**orders, "layers": {"namespaces": False, "landlock": 0}}, secret)
    held, found = json.loads(said["log"])["all_of_proc"]
    assert not held and "environ (secret)" in found
    closed = as_user(place, {**orders, "layers": {"namespaces": False}}, secret)
    assert json.loads(closed["log"])["all_of_proc"][0]


@pytest.mark.parametrize("namespaces", [True, False])
def test_limits(namespaces: bool, place: Path, able: dict[str, Any]) -> None:
    said = as_user(place, {"do": "limits", "layers": {"namespaces": namespaces and able["namespaces"]}})
    assert said["memory"].startswith("memory: ") and said["memory"].endswith(" of 128.0 MiB")
    assert said["processes"].startswith("processes: ")


def test_landlock_rights_by_abi() -> None:
    files, network, scopes = landlock.handled(1)
    assert (files, network, scopes) == ((1 << 13) - 1, 0, 0)
    assert landlock.handled(2)[0] == (1 << 14) - 1
    assert landlock.handled(3)[0] == (1 << 15) - 1
    assert landlock.handled(4) == ((1 << 15) - 1, 3, 0)
    assert landlock.handled(5)[0] == (1 << 16) - 1
    assert landlock.handled(7) == ((1 << 16) - 1, 3, 3)
