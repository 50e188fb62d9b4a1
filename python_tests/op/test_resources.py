"""What a user pays: repeatable bits, threads, memory linear in N, import time."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import EMULATED
from problems import MAPS, Problem, relative_error, run

from rebased_cuda import rebased_attention


def _everything(problem):
    inputs = problem.inputs(requires_grad=True)
    outputs = run(rebased_attention, inputs, problem)
    leaves = [x for x in inputs if x is not None]
    return [*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature_map", MAPS)
def test_bitwise_repeatable(feature_map, dtype, device):
    problem = Problem(feature_map, seqlen=200, feature_dim=16, head_dim=64, dtype=dtype, device=device)
    first, second = _everything(problem), _everything(problem)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(EMULATED, reason="the native backend's threads")
@pytest.mark.parametrize("feature_map", MAPS)
def test_thread_count_changes_nothing_beyond_rounding(feature_map):
    problem = Problem(feature_map, batch=1, heads=1, kv_heads=1, seqlen=3000, feature_dim=16, head_dim=64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(_everything(problem))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert relative_error(a, b) <= 1e-11


MEMORY = """
import resource, sys, torch
from rebased_cuda import rebased_attention
torch.set_num_threads(2)
n = int(sys.argv[1])
q, k, v = (torch.randn(1, 2, n, w, requires_grad=True) for w in (16, 16, 64))
warm = [x.detach()[:, :, :256].clone().requires_grad_() for x in (q, k, v)]
rebased_attention(*warm, layer_norm="token").sum().backward()
gradient = torch.ones(1, 2, n, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rebased_attention(q, k, v, layer_norm="token").backward(gradient)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(EMULATED, reason="the emulator's own memory would be counted")
def test_memory_is_linear_and_holds_no_features():
    """Forward + backward at N = 100,000, 2 heads: y, r, the gradients and little more.

    Features would be 136 floats a head-token, 109 MB here; the outputs alone are 64 + 1 + 16 + 16 + 64
    floats a head-token (129 MB), and the token LayerNorm's dq', dk' in backward 32 more (26 MB).
    """
    n, heads = 100_000, 2
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(n)], capture_output=True, text=True, check=True
    )
    outputs = n * heads * 4 * (64 + 1 + 16 + 16 + 64 + 32)
    assert int(result.stdout) <= outputs + 32 * 2**20


WORKING_MEMORY = """
import ctypes, sys, torch
from rebased_cuda.autograd import ops
torch.set_num_threads(2)
feature_map, layer_norm = sys.argv[1:]
q, k, v, gradient = (torch.randn(1, 1, 131072, w) for w in (16, 16, 64, 64))
options = (feature_map, layer_norm, 0.25, 1e-6, 1e-5, True)
absent = (None,) * 5

def resident(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

def grown(call):
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM
    before = resident("VmRSS")
    outputs = call()
    return outputs, resident("VmHWM") - before - sum(x.nbytes for x in outputs)

def both(q, k, v, gradient):
    (y, r), forward = grown(lambda: ops.forward(q, k, v, *absent, *options))
    grads = lambda: ops.backward(gradient, q, k, v, *absent, y, r, *options)
    return forward, grown(grads)[1]

both(*(x[:, :, :4096] for x in (q, k, v, gradient)))
print(*both(q, k, v, gradient))
"""


@pytest.mark.skipif(EMULATED, reason="the native backend's workspace")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux' high-water mark")
@pytest.mark.parametrize("layer_norm", ["token", "head"])
@pytest.mark.parametrize(("feature_map", "features"), [("outer", 136), ("square", 16)])
def test_working_memory_at_a_long_sequence(feature_map, features, layer_norm):
    """Beyond inputs, outputs and saved tensors: 4 states and 2 MB a thread, one head of N = 131,072."""
    result = subprocess.run(
        [sys.executable, "-c", WORKING_MEMORY, feature_map, layer_norm],
        capture_output=True,
        text=True,
        check=True,
    )
    forward, backward = map(int, result.stdout.split())
    assert max(forward, backward) <= 4 * features * (64 + 1) * 4 + 2 * (2 << 20)


def test_import_is_cheap():
    """At most 0.2 s beyond torch's own, the median of five."""
    code = textwrap.dedent("""
        import time
        import torch
        start = time.perf_counter()
        import rebased_cuda
        print(time.perf_counter() - start)
    """)
    times = sorted(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    )
    assert times[2] <= 0.2
