"""Loads the compiled part and turns whatever can go wrong there into one readable sentence."""

from __future__ import annotations

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(f"rebased_cuda needs torch 2.11 or later, this is {torch.__version__}.")


def _has_compiled_part(folder: Path) -> bool:
    return any((folder / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)


def _no_compiled_part(here: Path) -> str:
    """Why the package folder `here` has no compiled part for this Python, and what to do: one sentence."""
    for_others = ", ".join(sorted(x.name for x in here.glob("_C.*")))
    what = f"{here} has a compiled part for another Python only ({for_others})"
    if not for_others:
        what = f"{here} is source code without a compiled part"
    elsewhere = (Path(entry or ".").resolve() / "rebased_cuda" for entry in sys.path)
    installed = next((x for x in elsewhere if x != here and _has_compiled_part(x)), None)
    build = f"run `pip install -e .` in {here.parent}"
    if installed is None:
        return f"{what}: {build}."
    return f"{what}, and hides the installed {installed}: start Python in another folder, or {build}."


if not _has_compiled_part(_HERE := Path(__file__).resolve().parent):
    raise ImportError(_no_compiled_part(_HERE))
try:
    from . import _C  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        f"rebased_cuda's compiled part does not load under torch {torch.__version__}: {error}. It is built "
        "by `pip install --no-build-isolation .` in the source folder: reinstall it for this Python."
    ) from error

_BACKEND = os.environ.get("REBASED_CPU_BACKEND", "native")
if _BACKEND not in ("native", "emulated"):
    raise ImportError(f"REBASED_CPU_BACKEND: must be native or emulated, got {_BACKEND!r}.")
_ISA = os.environ.get("REBASED_CPU_ISA", "avx512_amx")
_ISAS = ("avx512_amx", "avx512_bf16", "avx512", "avx2", "portable")
if _ISA not in _ISAS:
    raise ImportError(f"REBASED_CPU_ISA: must be one of {', '.join(_ISAS)}, got {_ISA!r}.")
if _BACKEND == "emulated" and not _C.build_info()["emulator"]:
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
    return {**_C.build_info(), "cpu_backend": _BACKEND}
