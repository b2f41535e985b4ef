"""The lint: what it refuses (with line, rule and advice), what it lets pass, and that no input whatever breaks it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import guard
from core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
BUILD = "def build(spec):\n    return None\n"

REFUSED = [
    # (line of code, rule, fragment of the message)
    ("import os", "import", "no files"),
    ("import os.path as p", "import", "no files"),
    ("import time", "import", "progress"),
    ("from time import monotonic", "import", "progress"),
    ("import sys", "import", "interpreter"),
    ("import gc", "import", "interpreter"),
    ("import inspect", "import", "interpreter"),
    ("import ctypes", "import", "interpreter"),
    ("import importlib", "import", "interpreter"),
    ("import subprocess", "import", "no processes"),
    ("import threading", "import", "no processes"),
    ("import multiprocessing.shared_memory", "import", "no processes"),
    ("from concurrent.futures import ThreadPoolExecutor", "import", "no processes"),
    ("import socket", "import", "no network"),
    ("import urllib.request", "import", "no network"),
    ("import pickle", "import", "no files"),
    ("import mmap", "import", "no files"),
    ("import bible", "import", "no files"),
    ("import random", "import", "spec.seed"),
    ("import core.referee", "import", "only torch"),
    ("from backends import worker", "import", "only torch"),
    ("from . import secrets", "import", "relative"),
    ("from torch import *", "import", "hides"),
    ("from torch.utils import cpp_extension", "attribute", "at run time"),
    ("import torch.utils.cpp_extension", "import", "at run time"),
    ("import torch.distributed as d", "import", "no processes"),
    ("exec('x = 1')", "builtin", "write the code out"),
    ("eval('1')", "builtin", "write the code out"),
    ("e = eval", "builtin", "write the code out"),
    ("ｅｖａｌ('1')", "builtin", "write the code out"),
    ("compile('1', '', 'eval')", "builtin", "write the code out"),
    ("open('/etc/passwd')", "builtin", "no files"),
    ("__import__('os')", "builtin", "write the code out"),
    ("globals()['x'] = 1", "builtin", "interpreter"),
    ("vars()", "builtin", "interpreter"),
    ("breakpoint()", "builtin", "interpreter"),
    ("input()", "builtin", "interpreter"),
    ("setattr(x, 'y', 1)", "builtin", "plainly"),
    ("print('val_bpb: 0.1', file=x)", "file", "log"),
    ("getattr(x, 'a' + 'b')", "builtin", "computed"),
    ("getattr(x, name)", "builtin", "computed"),
    ("getattr(torch, spec.name)", "builtin", "computed"),
    ("g = getattr", "builtin", "as a value"),
    ("getattr(x, '__class__')", "dunder", "__class__"),
    ("().__class__.__mro__", "dunder", "__class__"),
    ("build.__globals__", "dunder", "__globals__"),
    ("__builtins__", "builtin", "interpreter"),
    ("x.f_back", "attribute", "f_back"),
    ("torch.load('w')", "file", "no files"),
    ("torch.save(1, 'w')", "file", "no files"),
    ("t = torch\nt.load('w')", "file", "no files"),
    ("from torch import load as innocent", "file", "no files"),
    ("torch.hub.load('a', 'b')", "file", "no files"),
    ("torch.from_file('w', size=9)", "file", "no files"),
    ("torch.UntypedStorage.from_file('w')", "file", "no files"),
    ("torch.ops.load_library('x.so')", "attribute", "at run time"),
    ("torch.jit.load('m')", "attribute", "at run time"),
    ("torch.os.system('ls')", "import", "torch.os"),
    ("torch.utils.data.sys.modules", "file", "no files"),
    ("torch._C._set_grad_enabled(False)", "attribute", "private"),
    ("torch.library.Library('aten', 'IMPL')", "attribute", "interpreter"),
    ("torch.overrides.TorchFunctionMode", "attribute", "interpreter"),
    ("torch.compile(build, backend=build)", "patch", "backend"),
    ("torch.log_softmax = build", "patch", "torch.log_softmax"),
    ("torch.nn.functional.cross_entropy = build", "patch", "cross_entropy"),
    ("torch._inductor.config.cpp.cxx = 'evil'", "patch", "cxx"),
    ("np.load('w.npy')", "file", "no files"),
    ("np.fromfile('w')", "file", "no files"),
    ("np.memmap('w')", "file", "no files"),
    ("np.zeros(3).tofile('w')", "file", "tofile"),
    ("torch.manual_seed(1337)", "seed", "1337"),
    ("SEED = 7\ntorch.manual_seed(SEED)", "seed", "SEED"),
    ("torch.Generator().manual_seed(7)", "seed", "7"),
    ("torch.seed()", "attribute", "spec.seed"),
    ("np.random.default_rng()", "seed", "unseeded"),
    ("np.random.seed(3)", "seed", "3"),
    ("np.random.randn(3)", "seed", "unseeded"),
    ("X = b'" + "q" * 5000 + "'", "literal", "5,000 bytes"),
    ("X = [" + "0.125, " * 1000 + "]", "literal", "table"),
    ("class T(torch.Tensor):\n    def __torch_function__(self): pass", "dunder", "__torch_function__"),
    ("def f(:", "syntax", "not valid Python"),
    ("return 1", "syntax", "not valid Python"),
    ("x = " + "-" * 30000 + "1", "syntax", "nested"),
]


@pytest.mark.parametrize(("code", "rule", "fragment"), REFUSED, ids=[c[:40] for c, _, _ in REFUSED])
def test_refused(code: str, rule: str, fragment: str) -> None:
    source = f"import numpy as np\nimport torch\n{code}\n{BUILD}".encode()
    found = [f for f in guard.check(source) if f.rule == rule and fragment in f.message]
    assert found, guard.check(source)
    assert 3 <= found[0].line <= 4 or "nested" in fragment


LITERALS = "\n".join(f"X{i} = '{'abcdefgh' * 250}{i}'" for i in range(9))
RAW = [
    (b"x = 1\0\n", "source", "null"),
    (b"x = 1\ny = '\xff'\n", "source", "UTF-8"),
    (b"# coding: utf-7\n", "source", "utf-7"),
    (b"#" * (guard.MAX_SOURCE + 1), "size", "65,537 bytes"),
    (b"", "contract", "build"),
    (b"def train(): pass", "contract", "build"),
    (f"{LITERALS}\n{BUILD}".encode(), "literal", "all literals"),
]


@pytest.mark.parametrize(("source", "rule", "fragment"), RAW, ids=[r[2] for r in RAW])
def test_refused_as_a_whole(source: bytes, rule: str, fragment: str) -> None:
    assert [f for f in guard.check(source) if f.rule == rule and fragment in f.message]


def test_packed_knowledge_is_bounded_without_the_lint() -> None:
    """60 KB of comments compress well and pass; 60 KB of noise, however it is spelt, do not."""
    import numpy as np

    prose = ("# " + "the loss is the mean over all targets of a row, in nats\n" * 900).encode()[:60000]
    assert guard.limits(prose) == []
    noise = np.random.default_rng(0).integers(33, 127, 60000).astype(np.uint8).tobytes()
    assert [f.rule for f in guard.limits(b"#" + noise)] == ["size"]


ACCEPTED = [
    "class M(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.eval()",
    "def forward(self, input, compile=True):\n    open = input\n    return open if compile else input",
    "def f(spec):\n    torch.manual_seed(spec.seed)\n    return np.random.default_rng(spec.seed + 1).random(3)",
    "def f(seed):\n    return torch.Generator(device='cpu').manual_seed(seed)",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.set_float32_matmul_precision('high')",
    "f = torch.compile(build, dynamic=False, fullgraph=True)",
    "def step(ps, gs):\n    torch._foreach_add_(ps, gs, alpha=-0.1)",
    "@torch.no_grad()\ndef f(m):\n    return {n: p.detach().float().numpy() for n, p in m.named_parameters()}",
    "class F(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x):\n        return x",
    "print('depth', 4)",
    "x = getattr(build, 'depth', None)",
    "def f(spec):\n    return getattr(torch, spec.dtype)",
    "torch._dynamo.config.cache_size_limit",
    "from torch.nn.attention.flex_attention import flex_attention, create_block_mask",
    "from kernels.mlp import relu2_mlp",
    "from dataclasses import dataclass, field\n@dataclass(frozen=True)\nclass C:\n    depth: int = 4",
    "import triton\nimport triton.language as tl\n@triton.jit\ndef k(x, n: tl.constexpr):\n    return tl.load(x + n)",
    "import mlx.core as mx\ndef f(spec):\n    return mx.random.key(spec.seed)",
    "x = 'a sentence about os, sys, eval and __class__'",
    "if __name__ == '__main__':\n    print('this file is run by the referee')",
    "def time(x):\n    return x.time",
    "class S:\n    def load(self, w): return w\n    def save(self): return self.load(1)",
]


@pytest.mark.parametrize("code", ACCEPTED, ids=[c[:40] for c in ACCEPTED])
def test_accepted(code: str) -> None:
    source = f"from __future__ import annotations\nimport numpy as np\nimport torch\n{code}\n{BUILD}".encode()
    assert guard.check(source) == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "backends").glob("*/train.py")), ids=lambda p: p.parent.name)
def test_the_shipped_recipes_pass(recipe: Path) -> None:
    assert guard.check(recipe.read_bytes()) == []


def test_windows_line_ends_and_byte_order_mark_pass() -> None:
    assert guard.check(b"\xef\xbb\xbf" + BUILD.replace("\n", "\r\n").encode()) == []


def test_require_names_lines_and_counts() -> None:
    with pytest.raises(guard.GuardError) as caught:
        guard.require(("import os\nimport sys\n" + "eval('1')\n" * 9 + BUILD).encode())
    assert isinstance(caught.value, UserError)
    assert "line 1: imports `os`" in caught.value.fact and "and 6 more" in caught.value.fact
    assert len(caught.value.findings) == 11
    guard.require(BUILD.encode())


WORDS = "torch ( ) . __class__ getattr = lambda : eval if @ { } [ ] async await 0 é"
PIECES = [
    *WORDS.split(),
    *("import os", "def build(spec)", "\n", " ", "    ", "'", '"""', "\\", "\t", "\f", "f'{"),
]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | st.lists(st.sampled_from(PIECES), max_size=60).map(lambda p: "".join(p).encode()))
def test_any_bytes_give_findings_and_never_an_exception(source: bytes) -> None:
    for finding in guard.check(source):
        assert finding.line >= 1 and finding.message and finding.rule


@pytest.mark.parametrize(
    "unit", ["(", "[", "-", "not ", ".a", "()", "+1", "lambda:", "a=", "**1", "if a:\n ", "1 if a else "]
)
def test_deep_nesting_never_ends_the_program(unit: str) -> None:
    source = ("x = a" + unit * (60000 // len(unit))).encode()
    assert guard.check(source)
