"""What to do after `python -m rebased_cuda`, and whether a GPU could be used that this build is not for."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from .report import Report

NEXT = (
    "layer: rebased_cuda.ReBasedAttention(768), from x (batch, N, 768) to the same; help() of it says more",
    'model: pip install "transformers>=5.24", then python examples/train_lm.py and examples/generate.py',
    "docs:  README.md and docs/ in the source folder; help(rebased_cuda.rebased_attention) anywhere",
)


def next_steps(report: Report) -> None:
    """Three lines: a layer, a model, the documentation."""
    report.say("\nNext:")
    for line in NEXT:
        report.say(f"  {line}")


def gpu_verdict(
    built: dict[str, Any], capabilities: dict[str, tuple[int, int]], driver: bool, device: str
) -> str:
    """Whether a GPU could be used and was not built for, in one line.

    Args:
        built: as `build_info` has it.
        capabilities: of the GPUs that torch sees, by name.
        driver: whether NVIDIA's driver is installed, seen by torch or not.
        device: what the job ran on.
    """
    if not capabilities:
        if driver:
            return (
                "GPU: NVIDIA's driver is installed, but this torch sees no GPU: a torch with CUDA is needed"
            )
        return "GPU: none here"
    names = ", ".join(sorted(capabilities))
    again = "build again here, with nvcc on PATH: pip install --no-build-isolation ."
    if not built["cuda"]:
        return f"GPU: {names} could be used, but this build has no CUDA kernels: {again}"
    left_out = [name for name, at in capabilities.items() if not runs_on(built["cuda_architectures"], at)]
    if left_out:
        kinds = built["cuda_architectures"]
        return f"GPU: {', '.join(left_out)} could be used, but this build is for {kinds} only: {again}"
    return f"GPU: {names}, which this build is for" + ("" if device == "cuda" else f"; this ran on {device}")


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for `architectures` ("80-real 90") runs on a GPU.

    A binary does within its major version, from its minor one on, PTX everywhere from its version on.
    """
    for name in architectures.split():
        number, _, kind = name.partition("-")
        digits = number.rstrip("af")  # 90a: for that one architecture
        at = (int(digits[:-1]), int(digits[-1]))
        binary = kind != "virtual" and at[0] == capability[0] and at <= capability
        ptx = kind != "real" and at <= capability
        if at == capability or (number == digits and (binary or ptx)):
            return True
    return False


def gpu_line(built: dict[str, Any], device: str) -> str:
    """`gpu_verdict` of this machine."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    capabilities = {torch.cuda.get_device_name(i): torch.cuda.get_device_capability(i) for i in range(count)}
    return gpu_verdict(built, capabilities, shutil.which("nvidia-smi") is not None, device)
