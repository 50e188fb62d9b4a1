"""`python -m rebased_cuda`: shows what was built, checks that it is right, trains, decodes, and times it.

Takes under two minutes on two cores. Exit code 0 if every check passed, else 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import torch

from . import __version__, build_info
from .demo.checks import FEATURE_DIM, HEAD_DIM, HEADS, SEQLEN, accuracy, gradcheck
from .demo.guidance import gpu_line, next_steps
from .demo.report import Report
from .demo.speed import speed
from .demo.timing import machine
from .demo.training import training


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rebased_cuda", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, progress on stderr")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if built for it and present")
    parser.add_argument("--gradcheck-only", action="store_true", help="only the gradients, in seconds")
    parser.add_argument("--seconds", type=float, default=20.0, help="training time (default 20)")
    return parser.parse_args(argv)


def _introduce(report: Report, device: str) -> None:
    built, here = build_info(), machine()
    report.results |= {"version": __version__, "build": built, "machine": here, "device": device}
    kernels = "no CUDA kernels"
    if built["cuda"]:
        kernels = f"CUDA kernels ({built['cuda_version']}) for {built['cuda_architectures']}"
    report.say(
        f"rebased_cuda {__version__}, built by {built['compiler']} against torch {built['torch_version']}"
    )
    report.say(f"  contains: CPU kernels, {kernels}" + (", emulator" if built["emulator"] else ""))
    report.say(
        f"  runs on: {here['cpu']}, {here['cores']} cores, {here['threads']} threads, "
        f"{built['cpu_instruction_set']}, CPU backend {built['cpu_backend']}"
    )
    report.say(f"           GPU: {', '.join(here['gpus']) or 'none'}")
    report.say(f"           torch {here['torch']}, Python {here['python']}, {here['system']}")
    report.say(f"  device: {device}")


def _usable(report: Report, device: str) -> bool:
    """Whether the device that was asked for can be used; a failed check if not."""
    if device != "cuda":
        return True
    if not build_info()["cuda"]:
        return report.verdict(
            "device cuda", False, "this build has no CUDA kernels: build it with nvcc on PATH"
        )
    if not torch.cuda.is_available():
        return report.verdict("device cuda", False, "torch sees no GPU")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    start = time.monotonic()
    report = Report(sys.stderr if arguments.json else sys.stdout)
    device = arguments.device or ("cuda" if build_info()["cuda"] and torch.cuda.is_available() else "cpu")
    _introduce(report, device)
    if _usable(report, device):
        with report.stage("Gradients: float64, against finite differences"):
            gradcheck(report, device)
        if not arguments.gradcheck_only:
            shape = f"{HEADS} heads, d {FEATURE_DIM}, dv {HEAD_DIM}, N {SEQLEN}"
            for feature_map in ("outer", "square"):
                with report.stage(f"The op ({feature_map}): {shape}, against the float64 reference"):
                    accuracy(report, device, feature_map)
            with report.stage("Training: a short convolution and a ReBased layer, on the standard library"):
                training(report, device, arguments.seconds)
            with report.stage("Speed"):
                speed(report, device)
    failed = [check["name"] for check in report.checks if not check["passed"]]
    seconds = time.monotonic() - start
    report.say(f"\n{len(report.checks) - len(failed)} of {len(report.checks)} checks passed, {seconds:.0f} s")
    if failed:
        report.say("FAILED: " + "; ".join(failed))
    report.say(gpu_line(build_info(), device))
    next_steps(report)
    if arguments.json:
        summary = {"passed": report.passed, "seconds": round(seconds, 1), "checks": report.checks}
        print(json.dumps(summary | report.results))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
