"""What the plan of the CUDA kernels says of a call, from shapes and strides and a device's limits alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._load import build_info, module

EMULATED = build_info()["cpu_backend"] == "emulated"
Limits = tuple[int, int, int]
"""Multiprocessors, compute capability (90 for 9.0), the most bytes of shared memory that a block may have."""


def limits_of(device: torch.device) -> Limits | None:
    """Of a GPU, or of the emulator that stands for the CPU; None where there is neither."""
    if device.type == "cuda" and torch.cuda.is_available():
        index = torch.cuda.current_device() if device.index is None else device.index
        return module().device_limits(index)  # type: ignore[no-any-return]
    return module().device_limits(-1) if device.type == "cpu" and EMULATED else None


def given_call(
    inputs: Sequence[Tensor | None],
    options: Sequence[Any],
    cu_seqlens: Tensor | None,
    limits: Limits,
    *,
    initial_state: bool,
    return_state: bool,
    keep: bool,
) -> Any:
    """A checked call: forward() and backward() give its plans as dicts.

    Args:
        inputs: q, k, v, gamma_q, beta_q, gamma_k, beta_k.
        options: as the operators take them.
        keep: whether forward keeps for backward, and backward is given, all that it can use.
    """
    qkv: list[Any] = list(inputs[:3])
    feature_map, layer_norm, _, _, _, normalize = options
    return module().GivenCall(
        sizes=[[int(size) for size in x.shape] for x in qkv],
        strides=[[int(stride) for stride in x.stride()] for x in qkv],
        dtype=str(qkv[0].dtype).removeprefix("torch."),
        feature_map=feature_map,
        layer_norm=layer_norm,
        parameters=[x is not None for x in inputs[3:7]],
        sequences=-1 if cu_seqlens is None else int(cu_seqlens.shape[0]) - 1,
        normalize=normalize,
        initial_state=initial_state,
        return_state=return_state,
        keep=keep,
        multiprocessors=limits[0],
        compute_capability=limits[1],
        shared_memory_per_block=limits[2],
    )
