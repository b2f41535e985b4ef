"""The backends: one folder each, with the same four doors. A new backend is a new folder with these files:

    train.py      the recipe that this hardware starts from (core.contract.Recipe)
    device.py     open_device() -> core.contract.Device; loads torch or mlx, so only children import it
    profiles.py   profiles(hardware) -> list[Profile], best first; scale(profile, seconds_per_step) -> Profile

`core.hardware.BACKENDS` holds the names in the order of detection. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import hardware as _hardware
from core import recipe as _recipe
from core.contract import Device
from core.errors import UserError
from core.hardware import Hardware
from core.settings import Profile


@dataclass(frozen=True)
class Backend:
    name: str
    folder: Path

    @property
    def recipe_path(self) -> Path:
        return self.folder / "train.py"

    def recipe(self) -> bytes:
        """The recipe as it is shipped, before `fit`."""
        return self.recipe_path.read_bytes()

    def profiles(self, hardware: Hardware) -> list[Profile]:
        """Profiles for this machine, best first; the last is `demo`. Does not load torch or mlx."""
        found: list[Profile] = self._call("profiles", "profiles")(hardware)
        return found

    def profile(self, hardware: Hardware, name: str | None = None) -> Profile:
        """The profile of this name, or the best; UserError with the known names."""
        known = self.profiles(hardware)
        if name is None:
            return known[0]
        for profile in known:
            if profile.name == name:
                return profile
        raise UserError(
            f"the backend {self.name} has no profile {name!r}", f"known are: {', '.join(p.name for p in known)}"
        )

    def scale(self, profile: Profile, seconds_per_step: float) -> Profile:
        """The profile refitted to a measured step time of its constants on this machine."""
        scaled: Profile = self._call("profiles", "scale")(profile, seconds_per_step)
        return scaled

    def plans(self, profile: Profile, hardware: Hardware) -> list[dict[str, Any]]:
        """Constants of each way in which the profile's batch fits into memory, the likeliest to be fast first; none
        where a backend has but one way."""
        module = importlib.import_module(f"backends.{self.name}.profiles")
        find = getattr(module, "plans", None)
        return [plan.constants() for plan in find(profile, hardware)] if find else []

    def remarks(self, hardware: Hardware) -> list[str]:
        """What to know about the device before a night on it, one line each."""
        module = importlib.import_module(f"backends.{self.name}.profiles")
        find = getattr(module, "remarks", None)
        return list(find(hardware)) if find else []

    def open_device(self) -> Device:
        """Loads the backend's library; called in children only."""
        device: Device = self._call("device", "open_device")()
        return device

    def _call(self, module: str, function: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(f"backends.{self.name}.{module}"), function)
        return found


def names() -> list[str]:
    """Backends of this version, in the order of detection."""
    return _hardware.built()


def load(name: str) -> Backend:
    """The backend of this name. UserError where it is unknown or not built in this version."""
    if name not in _hardware.BACKENDS:
        raise UserError(f"there is no backend {name!r}", f"known are: {', '.join(_hardware.BACKENDS)}")
    if name not in names():
        raise UserError(
            f"the backend {name} (for {_hardware.BACKENDS[name]}) is not built in this version",
            f"choose --backend {' or '.join(names()) or 'none'}",
        )
    return Backend(name, Path(__file__).resolve().parent / name)


def device_name(backend: str, hardware: Hardware) -> str:
    """What `Spec.device` says for this backend on this machine, as the backend's library names it."""
    if backend in ("cuda", "rtx"):
        return "cuda:0"
    return "gpu" if backend == "mlx" and (hardware.chip or hardware.gpus) else "cpu"


def fit(source: bytes, profile: Profile) -> bytes:
    """The recipe with the profile's constants; UserError names a constant that the recipe does not have."""
    return _recipe.replace(source.decode("utf-8"), profile.constants).encode("utf-8")
