"""Loads the compiled part and turns whatever can go wrong there into one readable sentence."""

from __future__ import annotations

import json
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(f"rebased_cuda needs torch 2.11 or later, this is {torch.__version__}.")


def _no_library(here: Path) -> str:
    """Why the package folder `here` has no compiled part, and what to do: one sentence."""
    what = f"{here} is source code without a compiled part"
    elsewhere = (Path(entry or ".").resolve() / "rebased_cuda" for entry in sys.path)
    installed = next((x for x in elsewhere if x != here and (x / _LIBRARY).is_file()), None)
    build = f"run `pip install -e .` in {here.parent}"
    if installed is None:
        return f"{what}: {build}."
    return f"{what}, and hides the installed {installed}: start Python in another folder, or {build}."


def _does_not_load(error: Exception) -> ImportError:
    reason = error.__cause__ or error  # torch says only which file it could not load
    return ImportError(
        f"rebased_cuda's compiled part does not load under torch {torch.__version__}: {reason}. It is built "
        "by `pip install --no-build-isolation .` in the source folder: reinstall it for this Python."
    )


_LIBRARY = "librebased_cuda.so"
_HERE = Path(__file__).resolve().parent
if not (_HERE / _LIBRARY).is_file():
    raise ImportError(_no_library(_HERE))
try:
    torch.ops.load_library(_HERE / _LIBRARY)  # type: ignore[no-untyped-call]
    _facts: dict[str, Any] = json.loads(torch.ops.rebased_cuda.build_info())
except (OSError, RuntimeError) as error:
    raise _does_not_load(error) from error
_module: Any = None
# The module is of one Python. A wheel has modules for several, and the operators serve all others too.
if any((_HERE / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
    try:
        from . import _C  # type: ignore[attr-defined]

        _module = _C
    except ImportError as error:
        raise _does_not_load(error) from error


def module() -> Any:
    """rebased_cuda._C, which tells of plans."""
    if _module is None:
        raise ImportError(
            f"rebased_cuda: this install has no module for Python 3.{sys.version_info.minor}, and cannot "
            "tell of plans; build it from source."
        )
    return _module


_BACKEND = os.environ.get("REBASED_CPU_BACKEND", "native")
if _BACKEND not in ("native", "emulated"):
    raise ImportError(f"REBASED_CPU_BACKEND: must be native or emulated, got {_BACKEND!r}.")
_ISA = os.environ.get("REBASED_CPU_ISA", "avx512_amx")
_ISAS = ("avx512_amx", "avx512_bf16", "avx512", "avx2", "portable")
if _ISA not in _ISAS:
    raise ImportError(f"REBASED_CPU_ISA: must be one of {', '.join(_ISAS)}, got {_ISA!r}.")
if _BACKEND == "emulated" and not _facts["emulator"]:
    raise ImportError(
        "REBASED_CPU_BACKEND=emulated, but this build has no emulator: build it with REBASED_EMULATOR=1."
    )


def build_info() -> dict[str, Any]:
    """What was built and what CPU tensors run on.

    Returns:
        A dict: `cuda` (bool), `cuda_version`, `cuda_architectures` ("80-real 90": machine code for 8.0,
        machine code and PTX for 9.0), `emulator` (bool), `torch_version` (built against), `compiler`,
        `cpu_instruction_set` (what this processor gets: avx512_amx, avx512_bf16, avx512, avx2 or portable),
        `cpu_backend` (native, or emulated: the CUDA kernels run on the CPU, for tests).
    """
    return {**_facts, "cpu_backend": _BACKEND}
