"""What all tests share: the devices of this machine, seeds, and how hard hypothesis tries.

CPU tensors go to the native backend, or with REBASED_CPU_BACKEND=emulated (a test build) through the CUDA
kernels on the emulator; the choice is made at import, so .ci/run runs pytest once for each.
"""

from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

import rebased_cuda
from rebased_cuda import testing

EMULATED = rebased_cuda.build_info()["cpu_backend"] == "emulated"

# The same whatever CPU tensors run on: the native run has them.
collect_ignore = (
    [
        "examples/test_examples.py",
        "experiments/test_attention_maps.py",
        "tools/test_benchmarks.py",
        "tools/test_build.py",
        "tools/test_house.py",
        "cuda/test_emulator.py",
        "cuda/test_kernel_reports.py",
        "experiments/test_learning.py",
        "tools/test_main.py",
        "experiments/test_mqar.py",
        "models/test_compiling.py",
        "models/test_convert.py",
        "models/test_model.py",
        "models/test_model_training.py",
        "cuda/ptx/test_ptx.py",
        "op/test_reference.py",
        "cuda/test_traffic.py",
        "experiments/test_training.py",
    ]
    if EMULATED
    else []
)

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    max_examples=20 if EMULATED else 60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=True,  # the same examples on every machine: a red run can be repeated
)
hypothesis.settings.load_profile("default")

DEVICES = ["cpu"]
if rebased_cuda.build_info()["cuda"] and torch.cuda.is_available():
    DEVICES.append("cuda")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


# where the CUDA kernels run: on a GPU, or emulated
KERNEL_DEVICES = [d for d in DEVICES if d == "cuda" or EMULATED]
needs_kernels = pytest.mark.skipif(not KERNEL_DEVICES, reason="neither an emulated backend nor a GPU")


@pytest.fixture(params=KERNEL_DEVICES or ["cpu"])
def kernel_device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def override() -> Iterator[Callable[..., None]]:
    """Forces a plan; undone after the test."""
    yield testing.set_plan_override
    testing.set_plan_override()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small problems: no faster on several threads, and many times slower where a core is taken."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_report_header() -> str:
    return f"rebased_cuda: {rebased_cuda.build_info()}, devices {DEVICES}"
