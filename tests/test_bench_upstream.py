"""What upstream's side of a bench gets in the place of the attention that it downloads."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from benchmarks import at_hand, blank_card, upstream  # noqa: E402 - after the skip
from benchmarks.side import Order  # noqa: E402
from kernels import attention_flash  # noqa: E402

LINES = """
import os
import torch
import torch.nn as nn
from kernels import get_kernel
cap = torch.cuda.get_device_capability()
repo = "one/for-hopper" if cap == (9, 0) else "one/for-others"
fa3 = get_kernel(repo).flash_attn_interface
DEPTH = 8
class GPT: pass
class GPTConfig: pass
"""
OTHERS = "\n".join(
    f"def {name}(*given): pass" if name.startswith("get_") else f"{name} = 1"
    for name in upstream.NEEDED
    if not name.startswith("GPT")
)
CONSTANTS = {"DEPTH": 2, "ASPECT_RATIO": 64, "HEAD_DIM": 64, "WINDOW_PATTERN": "SSSL", "DEVICE_BATCH_SIZE": 4}
ATTENTION = 256  # tokens of context


def place_of(folder, train=LINES + OTHERS):
    """What lies beside upstream's side, and its order."""
    (folder / "clone").mkdir()
    (folder / "clone" / "train.py").write_text(train)
    order = Order("turns", "upstream", "upstream", str(folder / "clone"), str(folder), 0.0, constants=CONSTANTS,
                  vocab_size=97, context=ATTENTION, weights="", batches="")  # fmt: skip
    *_, place = upstream._call(order, folder / "caches")
    return place, asdict(order)


@pytest.fixture
def side(tmp_path, monkeypatch):
    """The copy that is run, as a module, and its order. Cards are not asked."""
    place, order = place_of(tmp_path)
    spec = importlib.util.spec_from_file_location("side", place / "side.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    before = {*sys.modules}
    yield module, order
    for name in {*sys.modules} - before:
        if name.startswith("beside_"):
            del sys.modules[name]


def timed(monkeypatch, module, **times):
    """Candidates that give their names, and take so long; and what was timed."""
    asked = []

    def milliseconds(of, plain):
        asked.append((plain(None, None, None), of.window, of.rows))
        if isinstance(times[asked[-1][0]], Exception):
            raise times[asked[-1][0]]
        return times[asked[-1][0]]

    monkeypatch.setattr(
        module, "makers", lambda: {name: (lambda of, name=name: lambda q, k, v: name) for name in times}
    )
    monkeypatch.setattr(module, "timed", milliseconds)
    return asked


def test_each_window_gets_the_fastest_at_hand_which_is_told(monkeypatch, side):
    module, order = side
    asked = timed(monkeypatch, module, cudnn=1.0, flash=3.0, flex=4.0)
    call, said = module.standing(order, "cuda:0")
    assert said == (
        "flex over 128, cudnn over 256, in the place of what upstream downloads "
        "(over 128: flex 4 ms; over 256: cudnn 1 ms, flash 3 ms, flex 4 ms; cudnn: knows no windows; "
        "flash: knows no windows)"
    )
    q = torch.empty(1, ATTENTION, 1, 1)
    assert [call(q, q, q, True, (window, 0)) for window in (128, 256, -1)] == ["flex", "cudnn", "cudnn"]
    with pytest.raises(ValueError, match=r"a window of 64; known are \[128, 256\]"):
        call(q, q, q, True, (64, 0))
    assert asked == [("flex", 128, 4), ("cudnn", 256, 4), ("flash", 256, 4), ("flex", 256, 4)]


def test_later_processes_of_a_bench_take_what_the_first_one_timed(monkeypatch, side):
    module, order = side
    asked = timed(monkeypatch, module, flash=1.0, flex=2.0)
    _, first = module.standing(order, "cuda:0")
    count = len(asked)
    timed(monkeypatch, module, flash=2.0, flex=1.0)
    assert module.standing(order, "cuda:0")[1] == first and len(asked) == count


def test_upstreams_own_is_taken_where_it_is_there_and_as_fast(monkeypatch, side):
    module, order = side
    failing = {"fa3": RuntimeError("no kernel image\nis available"), "flex": 2.0}
    timed(monkeypatch, module, **{module.AS_IT_IS: 1.0, **failing})
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    _, said = module.standing(order, "cuda:0")
    assert said.startswith("upstream's own (over 128: upstream's own 1 ms, flex 2 ms; ")
    assert said.endswith("fa3: failed when timed: RuntimeError: no kernel image)")


def test_where_nothing_else_can_there_is_a_mask(monkeypatch, side):
    module, order = side
    timed(monkeypatch, module, flex=ImportError("no triton"))
    call, said = module.standing(order, "cuda:0")
    assert said.startswith(at_hand.MASKED + ", in the place of") and "flex: failed when timed: ImportError" in said
    q, k, v = (torch.randn(1, ATTENTION, 2, 8) for _ in range(3))
    torch.testing.assert_close(call(q, k, v, True, (128, 0)), at_hand.windowed_sdpa(q, k, v, True, (128, 0)))
    assert module.standing(order, "cpu")[1] == f"{at_hand.MASKED}, in the place of what upstream downloads"


def test_the_clones_own_lines_are_run_without_a_network(monkeypatch, side):
    """Those that fetch its attention, and no others."""
    module, _ = side
    asked = []

    def attend(q, k, v, causal, window_size):
        asked.append((causal, window_size))
        return q

    def get_kernel(name):
        asked.append((name, os.environ["HF_HUB_OFFLINE"]))
        return SimpleNamespace(flash_attn_interface=SimpleNamespace(flash_attn_func=attend))

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    of = SimpleNamespace(window=128, length=256)
    assert module.own(of)(1, 2, 3) == 1
    assert asked == [("one/for-others", "1"), (True, (128, 0))]
    os.environ.pop("HF_HUB_OFFLINE")


def test_only_the_lines_that_its_attention_needs_are_taken(tmp_path):
    (tmp_path / "train.py").write_text(LINES)
    kept = [line for line in LINES.strip().splitlines() if "GPT" not in line and "nn" not in line]
    wanted = [line for line in kept if line not in ("import os", "DEPTH = 8")]
    assert upstream.own_attention(tmp_path).replace("'", '"').splitlines() == wanted
    (tmp_path / "train.py").write_text("import torch\nclass GPT: pass\n")
    assert upstream.own_attention(tmp_path) == ""


def test_what_is_not_there_is_told(side):
    module, _ = side
    whole, half = (SimpleNamespace(window=window, length=256) for window in (256, 128))
    assert module.why_not(half, "cudnn") == module.why_not(half, "flash") == "knows no windows"
    assert module.why_not(whole, "cudnn") == module.why_not(half, "flex") == module.why_not(half, module.AS_IT_IS) == ""
    missing = importlib.util.find_spec(attention_flash.MODULE) is None
    assert bool(module.why_not(half, "fa3")) is missing
    assert module.windows(256, "L") == [256] and module.windows(256, "SSSL") == [128, 256]


def test_what_is_copied_needs_nothing_of_ours(tmp_path):
    place, _ = place_of(tmp_path)
    assert {file.name for file in place.glob("*.py")} == {
        "side.py", "at_hand.py", "attention_flash.py", "measured.py", "definitions.py", "own_attention.py",
    }  # fmt: skip
    for name in upstream.COPIED:
        assert not any(
            line.lstrip().startswith(("from kernels", "from benchmarks", "from core", "import kernels"))
            for line in (place / name).read_text().splitlines()
        )


ON_A_CARD = """
import importlib.util, json, sys
import torch
spec = importlib.util.spec_from_file_location("side", sys.argv[1])
side = importlib.util.module_from_spec(spec)
spec.loader.exec_module(side)
call, said = side.standing(json.loads(sys.argv[2]), "cuda:0")
q, k, v = (torch.randn(4, 256, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

@torch.compile(dynamic=False, fullgraph=True)
def layers(q, k, v):
    return call(call(q, k, v, causal=True, window_size=(128, 0)), k, v, causal=True, window_size=(256, 0))

layers(q, k, v).sum().backward()
print(json.dumps([said, list(q.grad.shape)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(blank_card.obstacle()), reason=f"no blank card here: {blank_card.obstacle()}")
def test_on_a_card_it_is_one_graph_with_upstreams_model(tmp_path):
    """On a blank one: FlexAttention is compiled and timed for both windows, and PyTorch's own for the whole context."""
    place, order = place_of(tmp_path)
    command = ["-c", ON_A_CARD, str(place / "side.py"), json.dumps(order)]
    done = blank_card.python(blank_card.CARDS["h100"], command, tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    said, shape = json.loads(done.stdout.splitlines()[-1])
    assert shape == [4, 256, 2, 64]
    assert said.startswith("flex over 128, ") and "over 256: " in said and "flash " in said.split("over 256: ")[1]
    assert "fa3: flash-attn-3 is not installed" in said
    assert json.loads((place / "attention.json").read_text())["names"]["128"] == "flex"
