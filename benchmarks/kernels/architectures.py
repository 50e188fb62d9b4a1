"""Compiles every instance for all architectures as the build does, warnings being errors, and times it.

One nvcc per source for all architectures, JOBS at a time; nothing comes from a cache. Where other work shares
the machine, half of the CPU time is what two idle cores would need at least.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.kernels.toolchain import (
    FLAGS,
    JOBS,
    ToolMissingError,
    compiler_release,
    cuda_program,
    instances,
)

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# those of CMakeLists.txt
BUILD_FLAGS = ("-O3", "-lineinfo", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-fPIC")


def compile_object(source: Path, architectures: list[int], folder: Path) -> tuple[float, str]:
    """Seconds, and what nvcc printed: nothing if all is well."""
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    command = [cuda_program("nvcc"), *FLAGS, *BUILD_FLAGS, *targets, "-c", str(source)]
    begin = time.monotonic()
    result = subprocess.run(
        [*command, "-o", str(folder / f"{source.stem}.o")], text=True, capture_output=True, check=False
    )
    output = result.stdout + result.stderr
    if result.returncode and not output.strip():
        output = f"nvcc ended with {result.returncode}"
    return time.monotonic() - begin, output.strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.architectures", description=__doc__)
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument(
        "--instances", nargs="+", default=["*"], metavar="PATTERN", help="only files whose name matches"
    )
    options = parser.parse_args(arguments)

    sources = [source for pattern in options.instances for source in instances(pattern)]
    before = os.getloadavg()[0]
    begin = time.monotonic()
    failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        results = pool.map(
            lambda source: compile_object(source, options.architectures, Path(folder)), sources
        )
        for source, (taken, output) in zip(sources, results, strict=True):
            print(f"{taken:7.1f} s  {source.name}", flush=True)
            if output:
                failed += 1
                print(output)
    names = " ".join(f"sm_{number}" for number in options.architectures)
    seconds = time.monotonic() - begin
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    machine = f"{JOBS} jobs on {os.cpu_count()} cores, load before {before:.1f}"
    print(f"{len(sources)} sources for {names} by {compiler_release()}, {machine}:")
    print(f"{seconds:.0f} s, CPU time {used.ru_utime + used.ru_stime:.0f} s")
    print(f"{failed} with warnings or errors")
    return 1 if failed or not sources else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ToolMissingError as error:
        sys.exit(f"error: {error}")
