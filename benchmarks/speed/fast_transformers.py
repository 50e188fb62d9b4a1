"""The causal product of fast-transformers on a CPU: one C++ file of its PyPI source, built for this machine.

Its whole package takes minutes to build and then has no -march=native. The file is kept in build/peers, which
git ignores. `python -m benchmarks.speed.fast_transformers` builds it; a full run of the benchmarks does so by
itself.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import torch

from .harness import UnavailableError

VERSION = "0.4.0"
NAME = "causal_product_cpu"
MEMBER = f"pytorch-fast-transformers-{VERSION}/fast_transformers/causal_product/{NAME}.cpp"
# its own two, and what it does not ask for
FLAGS = ("-fopenmp", "-ffast-math", "-O3", "-march=native")
FOLDER = (
    Path(__file__).resolve().parents[2] / f"build/peers/fast-transformers-{VERSION}-torch-{torch.__version__}"
)
_COMMAND = ("-m", "benchmarks.speed.fast_transformers")
SECONDS = 150  # for download and compiler; a quiet machine needs 30


def library() -> Path:
    return FOLDER / f"{NAME}.so"


@functools.cache
def module() -> ModuleType | str:
    """The built module, or why there is none; tried once a process."""
    if not library().exists():
        problem = _build()
        if problem:
            return problem
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(library()))
    specification = importlib.util.spec_from_loader(NAME, loader)
    assert specification is not None
    try:
        loaded = importlib.util.module_from_spec(specification)
        loader.exec_module(loaded)
    except ImportError as error:
        return f"built, but does not load: {error}"
    return loaded


def product(build: bool) -> type[torch.autograd.Function]:
    """Its autograd function; where it has never been built, built now only if `build`."""
    if not build and not library().exists():
        raise UnavailableError(
            "not built yet: a full run does, or python -m benchmarks.speed.fast_transformers"
        )
    built = module()
    if isinstance(built, str):
        raise UnavailableError(built)
    return _function(built)


def _build() -> str:
    """Runs this file as a program, within SECONDS; "" or what went wrong."""
    command = [sys.executable, *_COMMAND]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as child:
        try:
            output, _ = child.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # the compiler too
            return f"its build took more than {SECONDS} s"
    if child.returncode:
        return f"does not build: {' '.join(output.split())[-160:]}"
    return ""


def _without_nvcc() -> dict[str, str]:
    """The environment for its setup.py, which stops where it finds nvcc and torch has no CUDA."""
    folders = [x for x in os.environ.get("PATH", "").split(os.pathsep) if not shutil.which("nvcc", path=x)]
    return os.environ | {"PATH": os.pathsep.join(folders)}


def _function(built: ModuleType) -> type[torch.autograd.Function]:
    """Its CausalDotProduct: which tensors it saves and allocates is part of its time."""

    class CausalDotProduct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(q, k, v)
            y = torch.zeros(*q.shape[:3], v.shape[3])
            built.causal_dot_product(q, k, v, y)
            return y

        @staticmethod
        def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
            gradients = [torch.zeros_like(x) for x in ctx.saved_tensors]
            built.causal_dot_backward(*ctx.saved_tensors, grad_y, *gradients)
            return tuple(gradients)

    return CausalDotProduct


def main() -> None:
    """Downloads its source by pip and compiles the one file."""
    from torch.utils import cpp_extension

    FOLDER.mkdir(parents=True, exist_ok=True)
    name = f"pytorch-fast-transformers=={VERSION}"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "-d", str(FOLDER), name], check=True, env=_without_nvcc())
    with tarfile.open(FOLDER / f"pytorch-fast-transformers-{VERSION}.tar.gz") as archive:
        source = archive.extractfile(MEMBER)
        assert source is not None
        (FOLDER / f"{NAME}.cpp").write_bytes(source.read())
    os.environ["PATH"] += os.pathsep + str(
        Path(sys.executable).parent
    )  # ninja, in an environment not activated
    cpp_extension.load(
        NAME,
        [str(FOLDER / f"{NAME}.cpp")],
        extra_cflags=list(FLAGS),
        extra_ldflags=["-fopenmp"],
        build_directory=str(FOLDER),
    )


if __name__ == "__main__":
    main()
