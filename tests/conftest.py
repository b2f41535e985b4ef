"""What tests share: a home of their own, a small prepared data set, small settings, a small honest recipe.

Nothing here touches the user's own home. An experiment with these takes some five seconds on two cores, nearly all
of it for three children that import torch.
"""

from __future__ import annotations

import compileall
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Before NumPy and torch are loaded, which read it then. With a thread for each core in each of several workers, threads
# that wait for one another hold up those that work: half as long again for all, seven times for the worst test.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from core.data import Dataset
from core.outcome import Outcome, Request
from core.paths import project_root
from core.referee import execute
from core.settings import Settings
from prepare import prepare

hypothesis.settings.register_profile("untimed", deadline=None)  # an example takes as long as the machine is busy
hypothesis.settings.load_profile("untimed")

# About Linux's walls and forks, whose modules cannot be imported on Windows: their tests would all be skipped there.
WALLS = ("forking", "sandbox", "sandbox_cuda", "sandbox_user")
collect_ignore = [f"test_{name}.py" for name in WALLS] if sys.platform == "win32" else []

# Files that train against the clock, kill at random instants, or look at what else the machine does: other tests beside
# them would be what they measure. (Those of tamper/ train too, but what they show is that a cheat gets no score, and
# that an honest recipe gets one.) And blank_card, whose tests look at what one child compiled for a minute: several
# workers would each compile it.
ALONE = frozenset(
    f"test_{name}"
    for name in [
        "bench",
        "bench_kernels",
        "bench_labs",
        "claude_code",
        "claude_stop",
        "cli",
        "clock",
        "command",
        "cpu_device",
        "dryrun",
        "freezing",
        "gpu_benchmark",
        "gpuwatch",
        "health",
        "kill",
        "looks",
        "mcp",
        "memory_count",
        "mlx_referee",
        "placebo",
        "processes",
        "referee",
        "sandbox",
        "sandbox_user",
        "thinking",
        "windows_run",
    ]
)

# An embedding of this token and of the one before it, and an output layer that starts at zero. Its own Adam, because
# torch.optim takes a second to load. Tests change it by `str.replace`.
TINY_RECIPE = '''\
"""A small honest recipe: it predicts the next token from the last two."""

import numpy as np
import torch
from torch.nn import functional as F

WIDTH = 32
ROWS = 16  # search: 8..32
LR = 0.02  # search: 0.005..0.05 log


class Training:
    def __init__(self, spec):
        torch.manual_seed(spec.seed)
        self.spec = spec
        shapes = {
            "embed": (spec.vocab_size, WIDTH),
            "before": (spec.vocab_size, WIDTH),
            "head": (spec.vocab_size, WIDTH),
            "bias": (spec.vocab_size,),
        }
        self.params = {n: torch.randn(s) if n in ("embed", "before") else torch.zeros(s) for n, s in shapes.items()}
        for p in self.params.values():
            p.requires_grad_(True)
        self.moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in self.params.items()}
        self.steps = 0

    def model(self, tokens):
        p = self.params
        before = F.pad(tokens, (1, 0), value=self.spec.bos_id)[:, :-1]
        x = torch.tanh(p["embed"][tokens] + p["before"][before])
        return x @ p["head"].T + p["bias"]

    def step(self, batches, progress):
        tokens = batches.next(ROWS, self.spec.sequence_len)
        loss = F.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.steps += 1
        with torch.no_grad():
            for name, p in self.params.items():
                m, v = self.moments[name]
                m.lerp_(p.grad, 0.1)
                v.lerp_(p.grad.square(), 0.05)
                p -= LR * (1 - 0.9 * progress) * m / (v / (1 - 0.95**self.steps)).sqrt().add(1e-8)
                p.grad = None
        return loss.detach()

    @torch.no_grad()
    def logits(self, tokens):
        return self.model(tokens)

    def weights(self):
        return {n: p.detach().numpy() for n, p in self.params.items()}

    def load_weights(self, weights):
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(torch.from_numpy(weights[name]))

    def describe(self):
        return {"depth": 1, "flops_per_token": 6 * WIDTH * self.spec.vocab_size}


def build(spec):
    return Training(spec)
'''


# Of the other files: beside other tests it is ended for its slowness before it is caught for what it does.
ALONE_TESTS = {"test_tamper": {"test_the_wall_holds_without_the_lint[memory_two_passes]"}}


# Of the files above: what takes long, holds no time against another, and has minutes to spare where time may run out.
BESIDE = {
    "test_bench_kernels": {
        "test_every_way_computes_the_same",
        "test_mlx_computes_the_same",
        "test_the_cases_of_a_card_in_tritons_interpreter",
        "test_who_computes_something_else_is_not_timed",
    },
    "test_dryrun": {
        "test_a_good_recipe_and_one_that_prints_orders_before_it_fails",
        "test_a_want_of_memory_beside_others_is_not_held_against_a_candidate",
        "test_it_starts_from_a_copy_of_the_caches_that_it_is_given",
        "test_the_batch_is_made_small_unless_the_recipe_needs_it",
        "test_the_shipped_recipe_in_seconds",
        "test_where_a_card_would_wait_nothing_is_compiled_as_a_whole",
    },
    "test_gpu_benchmark": {"test_all_sections_run_small_and_write_what_they_found"},
    "test_mlx_referee": {"test_two_experiments_of_the_search"},
    "test_sandbox": {"test_torch_compiles"},
}


# Files whose tests look at what takes long to make once, half a minute for some: each of several workers would make it.
TOGETHER = frozenset(
    f"test_{name}"
    for name in ("blank_card", "blank_night", "compile_caches", "kernel_docs", "recipe_knobs", "report", "traffic")
)


def runs_alone(item: pytest.Item) -> bool:
    name, file = getattr(item, "originalname", item.name), item.path.stem
    return item.name in ALONE_TESTS.get(file, ()) or (file in ALONE and name not in BESIDE.get(file, ()))


def pytest_configure(config: pytest.Config) -> None:
    """Children write no bytecode, and would compile our modules anew, thousands of times."""
    if not hasattr(config, "workerinput"):
        for name in ("core", "backends", "kernels"):
            compileall.compile_dir(project_root() / name, quiet=1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m alone`: to import all the other files takes 20 seconds."""
    if config.option.markexpr != "alone" or not collection_path.match("test_*.py"):
        return None
    listed = collection_path.stem in ALONE or collection_path.stem in ALONE_TESTS
    return None if listed or "pytest.mark.alone" in collection_path.read_text("utf-8") else True


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker takes one test at a time, or one file of TOGETHER: xdist's own groups are lost with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if Path(file).stem in TOGETHER else nodeid

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if runs_alone(item):
            item.add_marker("alone")


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """AUTORESEARCH_HOME of the whole session. A test that needs an empty one sets the variable itself."""
    place = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_HOME", str(place))
        # On a busy machine threads that spin while they wait for each other slow small steps down a hundredfold.
        patch.setenv("OMP_WAIT_POLICY", "passive")
        yield place


@pytest.fixture(scope="session")
def dataset(home: Path) -> Dataset:
    """The King James Bible at 512 vocabulary entries, prepared in the session's home."""
    return prepare("kjv", vocab_size=512)


@pytest.fixture(scope="session")
def settings(dataset: Dataset) -> Settings:
    """T = 64, two seconds of training, 4,096 scored tokens."""
    return Settings(
        backend="cpu",
        profile="test",
        data=dataset.path.name,
        data_sha256=dataset.sha256,
        vocab_size=dataset.vocab_size,
        sequence_len=64,
        bos_id=dataset.bos_id,
        budget=2.0,
        eval_tokens=4096,
        dtype="float32",
        device="cpu",
        warmup_cap=60.0,
        logits_bytes=16 * 64 * 512 * 4,  # 16 rows in a batch
        audit_points=256,
    )


@pytest.fixture(scope="session")
def tiny_recipe() -> str:
    return TINY_RECIPE


@pytest.fixture
def run_recipe(dataset: Dataset, settings: Settings, tmp_path: Path) -> Callable[..., Outcome]:
    """`run_recipe(source, settings=..., on_event=..., stop=..., **fields of Request)` -> Outcome, audited always."""

    def run(source: str, on_event: Any = lambda event: None, stop: Any = None, **given: Any) -> Outcome:
        fields: dict[str, Any] = {
            "settings": settings,
            "dataset": dataset,
            "seed": settings.seed,
            "experiment": "test",
            "workdir": tmp_path / "work",
            "audit": "always",
            **given,
        }
        return execute(Request(source=source.encode(), **fields), on_event, stop)

    return run
