"""The CPU as a device: arithmetic against core's reference, conversions, and settings that come with a reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.cpu.device import CpuDevice, choose_dtype, memory_limit, open_device, usable_cores
from core import evaluate
from core.contract import Choice, Device

THREADS = torch.get_num_threads()


@pytest.fixture(scope="module")
def device():
    yield open_device()
    torch.set_num_threads(THREADS)


def test_is_a_device_with_a_reasoned_dtype(device):
    assert isinstance(device, Device)
    assert device.name == "cpu"
    assert device.dtype.value in ("float32", "bfloat16")
    assert device.dtype.reason
    assert torch.get_num_threads() == usable_cores()
    device.fence()


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "dtype", "word"),
    [(False, False, "float32", "no bfloat16"), (True, False, "bfloat16", "AVX512"), (True, True, "bfloat16", "AMX")],
)
def test_dtype_follows_the_processor(avx512_bf16, amx, dtype, word):
    choice = choose_dtype(avx512_bf16, amx)
    assert choice.value == dtype
    assert word in choice.reason


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 90),
    vocab=st.integers(1, 300),
    scale=st.sampled_from([0.0, 1.0, 15.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_nats_are_those_of_the_reference(rows, length, vocab, scale, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, length, vocab, generator=rng) * scale).to(dtype)
    targets = torch.randint(0, vocab, (rows, length), generator=rng).numpy()
    found = CpuDevice(Choice("float32", "")).nats(logits, targets)
    assert found.dtype == np.float32
    expected = evaluate.nats(logits.float().numpy(), targets)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-5 + 2e-7 * scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 129, 49), (0, 70, 25)])
def test_nats_refuse_what_is_not_finite(device, bad, place):
    logits = torch.zeros(2, 130, 50)
    targets = np.zeros((2, 130), dtype=np.int64)
    device.nats(logits, targets)
    logits[place] = bad
    with pytest.raises(ValueError, match="not finite"):
        device.nats(logits, targets)


def test_large_finite_logits_are_finite(device):
    logits = torch.full((1, 3, 50), 3e38)
    np.testing.assert_allclose(device.nats(logits, np.zeros((1, 3), dtype=np.int64)), np.log(50), rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (2, 5), (8,), (1, 2, 4)])
def test_nats_refuse_other_shapes(device, shape):
    with pytest.raises(ValueError, match="shape"):
        device.nats(torch.zeros(2, 4, 10), np.zeros(shape, dtype=np.int64))


def test_arrays_go_there_and_back(device):
    tokens = np.array([[1, 65535], [7, 0]], dtype=np.uint16)
    sent = device.from_numpy(tokens)
    assert sent.dtype == torch.int64
    assert (device.to_numpy(sent) == tokens).all()
    half = torch.tensor([1.0, 3.140625], dtype=torch.bfloat16, requires_grad=True)
    back = device.to_numpy(half)
    assert back.dtype == np.float32
    assert back.tolist() == [1.0, 3.140625]
    loss = torch.tensor(2.5, requires_grad=True)
    assert float(device.to_numpy(loss)) == 2.5


def test_memory_counts_what_is_taken(device):
    before = device.memory()
    block = torch.ones(2**29, dtype=torch.uint8)  # the process may give back some of what it had meanwhile
    after = device.memory()
    assert after.used - before.used > 2**28
    assert after.peak >= after.used
    assert after.limit >= after.used
    del block
    assert device.memory().peak >= after.used


def test_limits_of_a_container_count(tmp_path):
    whole, cores = memory_limit(tmp_path), usable_cores(tmp_path)  # no limits there
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert memory_limit(tmp_path) == whole
    assert usable_cores(tmp_path) == cores
    (tmp_path / "memory.max").write_text("1073741824\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert memory_limit(tmp_path) == 2**30
    assert usable_cores(tmp_path) == 1


def test_peak_is_measured_once(device):
    peak = device.peak()
    assert peak.flops_per_second > 1e8
    assert peak.source.startswith("measured")
    assert device.dtype.value in peak.source
    assert device.peak() is peak
