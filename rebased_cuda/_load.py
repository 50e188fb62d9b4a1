"""Loads the compiled part and turns whatever can go wrong there into one readable sentence."""

from __future__ import annotations

import os
from typing import Any

import torch

if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(f"rebased_cuda needs torch 2.11 or later, this is {torch.__version__}.")

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
