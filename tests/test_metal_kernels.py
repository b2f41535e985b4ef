"""The Metal kernels without Metal: their bodies are C++ but for a few words, so a C++ compiler builds them, 32 lanes
run as threads that meet at `simd_sum`, and the results are held against the plain reference."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
if shutil.which("g++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

from kernels import qk_norm_rope as kernel  # noqa: E402 - after the skips

EPSILON = 2.0**-23

SHIM = """
#include <barrier>
#include <cmath>
#include <cstddef>
#include <thread>
#include <vector>
typedef unsigned int uint;
struct uint3 { uint x, y, z; };
#define device
namespace metal { namespace precise {
inline float rsqrt(float v) { return 1.0f / std::sqrt(v); }
inline float sqrt(float v) { return std::sqrt(v); }
} }
static std::barrier<> meeting(32);
static float given[32];
static thread_local uint self;
static float simd_sum(float v) {
    given[self] = v;
    meeting.arrive_and_wait();
    float total = 0;
    for (float g : given) total += g;
    meeting.arrive_and_wait();
    return total;
}
typedef float E;
static const uint T = %(T)d, H = %(H)d, D = %(D)d, PAIRS = %(PAIRS)d;
static void one(const E* x, const float* cosine, const float* sine, const float* eps, const E* dy, E* y, E* dx,
                uint3 thread_position_in_threadgroup, uint3 threadgroup_position_in_grid) {
%(BODY)s
}
extern "C" void run(const E* x, const float* cosine, const float* sine, const float* eps, const E* dy, E* y, E* dx,
                    uint rows) {
    std::vector<std::thread> lanes;
    for (uint lane = 0; lane < 32; lane++)
        lanes.emplace_back([=] {
            self = lane;
            for (uint row = 0; row < rows; row++)
                one(x, cosine, sine, eps, dy, y, dx, uint3{lane, 0, 0}, uint3{0, row, 0});
        });
    for (auto& lane : lanes) lane.join();
}
"""


def build(tmp_path, name, body, T, H, D):
    source, library = tmp_path / f"{name}.cpp", tmp_path / f"{name}.so"
    source.write_text(SHIM % {"T": T, "H": H, "D": D, "PAIRS": -(-D // 64), "BODY": body})
    command = ["g++", "-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unused-variable"]
    done = subprocess.run([*command, str(source), "-o", str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("D", [16, 32, 64, 96, 128])
def test_the_kernels_are_the_reference(tmp_path, D):
    B, T, H = 2, 3, 2
    rng = np.random.default_rng(D)
    x, dy = (rng.normal(size=s).astype(np.float32) for s in ((B, T, H, D), (B, H, T, D)))
    angle = np.outer(np.arange(T), 10000.0 ** (-np.arange(0, D, 2) / D)).astype(np.float32)
    cos, sin, eps = np.cos(angle), np.sin(angle), np.array([EPSILON], np.float32)
    y, dx = np.full_like(dy, np.nan), np.full_like(x, np.nan)
    arrays = [a.ctypes.data_as(ctypes.c_void_p) for a in (x, cos, sin, eps, dy, y, dx)]
    for name, body in kernel.sources().items():
        build(tmp_path, name, body, T, H, D).run(*arrays, ctypes.c_uint(B * T * H))

    def reference(x):
        return kernel.reference(x, mx.array(cos), mx.array(sin), EPSILON)

    wanted, vjp = mx.vjp(reference, [mx.array(x)], [mx.array(dy)])
    np.testing.assert_allclose(y, np.array(wanted[0]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, np.array(vjp[0]), rtol=1e-4, atol=1e-5)


def test_elsewhere_the_reference_is_taken():
    if kernel.metal():
        pytest.skip("this machine has Metal")
    x = mx.random.normal((1, 4, 2, 32))
    cos, sin = mx.ones((4, 16)), mx.zeros((4, 16))
    y = kernel.qk_norm_rope(x, cos, sin, EPSILON)
    assert y.shape == (1, 2, 4, 32)
    np.testing.assert_allclose(np.array((y * y).sum(axis=-1)), 32**0.5, rtol=1e-4)
