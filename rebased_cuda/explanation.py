"""Which kernels a call would take on a GPU, and why, without one: `explain`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ._checks import check_bool, check_call, fail
from ._plan import given_call, limits_of
from .state import RebasedState, check_layout

_PATHS = {
    "tensor_core": "tensor cores",
    "float32": "register tiles for float32",
    "quadratic": "the general kernels, without a state",
    "general": "the general kernels",
}


@dataclass(frozen=True)
class DeviceLimits:
    """What of a GPU the choice of kernels depends on.

    Args:
        multiprocessors: how many it has.
        compute_capability: (9, 0) for 9.0.
        shared_memory_per_block: in bytes, the most that a kernel may ask for (opt-in).
    """

    multiprocessors: int
    compute_capability: tuple[int, int]
    shared_memory_per_block: int

    @staticmethod
    def of(device: torch.device) -> DeviceLimits:
        """The limits of a GPU of this machine, or in a test run of the emulator that stands for the CPU."""
        limits = limits_of(device)
        if limits is None:
            raise fail("device", "a GPU of this machine", device)
        return DeviceLimits(limits[0], (limits[1] // 10, limits[1] % 10), limits[2])


@dataclass(frozen=True)
class Reason:
    """What keeps a call from the tensor cores: the argument it is about, what of it, what would change it."""

    argument: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.argument}: {self.reason}; tensor cores take {self.remedy}"


@dataclass(frozen=True)
class Direction:
    """One direction of a call: its kernels, and all that keeps it from the tensor cores."""

    path: str
    """tensor_core, float32, quadratic or general: a family of kernels (csrc/cuda/README.md)."""
    segments: int
    """Runs of rows of a sequence that different blocks of threads walk at the same time."""
    workspace_bytes: int
    """Memory that the call takes while it runs."""
    kept_bytes: int
    """Memory that forward keeps for backward beyond y and one number a row."""
    reasons: tuple[Reason, ...]
    """Empty where tensor cores are taken."""

    def __str__(self) -> str:
        cut = "one segment" if self.segments == 1 else f"{self.segments} segments"
        return "\n".join([f"{_PATHS[self.path]}, {cut}", *(f"  {reason}" for reason in self.reasons)])


@dataclass(frozen=True)
class Explanation:
    """How a call and its backward would run on a GPU; str() says it in words."""

    device: DeviceLimits
    forward: Direction
    backward: Direction

    def __str__(self) -> str:
        return f"forward: {self.forward}\nbackward: {self.backward}"


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma_q: Tensor | None = None,
    beta_q: Tensor | None = None,
    gamma_k: Tensor | None = None,
    beta_k: Tensor | None = None,
    *,
    feature_map: str = "outer",
    layer_norm: str | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    layer_norm_eps: float = 1e-5,
    normalize: bool = True,
    initial_state: RebasedState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    device: DeviceLimits | Mapping[str, Any] | None = None,
) -> Explanation:
    """Which CUDA kernels `rebased_attention` would take with these arguments, and why no faster ones.

    Nothing is computed and no value is read: shapes, strides and dtypes say it all, so tensors on "meta" will
    do. Under autocast, what the call would be cast to.

    Args:
        q, k, v, and all others: as for `rebased_attention`.
        device: a GPU's limits, as `DeviceLimits` or a mapping with the same names, for tensors that are not
            on a GPU. Without it, those of q's GPU.

    Returns:
        `Explanation`: for `forward` and `backward` each the family of kernels, the number of segments, the
        memory that it takes, and all reasons that keep it from the tensor cores.

    Raises:
        ValueError, TypeError: an argument is wrong, or `device` is missing for a q that is not on a GPU.
    """
    limits = _limits(device, q)
    inputs = {"q": q, "k": k, "v": v, "gamma_q": gamma_q, "beta_q": beta_q, "gamma_k": gamma_k}
    inputs["beta_k"] = beta_k
    described = [_described(name, x, q) for name, x in inputs.items()]
    state: Any = initial_state
    if isinstance(initial_state, tuple):
        state = tuple(_described("initial_state", x, q) for x in initial_state)
    options = (feature_map, layer_norm, scale, eps, layer_norm_eps, normalize)
    index = _described("cu_seqlens", cu_seqlens, q)
    tensors, index, checked = check_call(described, options, state, index)
    return_state = check_bool("return_state", return_state)
    wanted = (*inputs.values(), *(initial_state or ()))
    major, minor = limits.compute_capability
    call = given_call(
        tensors[:7],
        checked,
        index,
        (limits.multiprocessors, 10 * major + minor, limits.shared_memory_per_block),
        initial_state=state is not None,
        return_state=return_state,
        keep=torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in wanted),
    )
    return Explanation(limits, _direction(call.forward()), _direction(call.backward()))


def _direction(plan: dict[str, Any]) -> Direction:
    if plan["error"]:
        raise ValueError(f"device: {plan['error']}")
    reasons = () if plan["path"] == "tensor_core" else tuple(Reason(*texts) for texts in plan["refusals"])
    return Direction(plan["path"], plan["segments"], plan["workspace_bytes"], plan["kept_bytes"], reasons)


def _limits(device: DeviceLimits | Mapping[str, Any] | None, q: Tensor) -> DeviceLimits:
    if device is None:
        if not (isinstance(q, Tensor) and q.is_cuda):
            raise fail("device", "the limits of a GPU, since q is not on one", None)
        return DeviceLimits.of(q.device)
    if isinstance(device, Mapping):
        names = [field.name for field in fields(DeviceLimits)]
        if sorted(device) != sorted(names):
            raise fail("device", f"the names {', '.join(names)}", ", ".join(map(str, device)) or "none")
        device = DeviceLimits(**device)
    if not isinstance(device, DeviceLimits):
        raise TypeError(f"device: expected DeviceLimits or a mapping, got {type(device).__name__}")
    numbers = (device.multiprocessors, device.shared_memory_per_block, *device.compute_capability)
    if not all(isinstance(x, int) and 0 <= x < 2**31 for x in numbers) or device.multiprocessors == 0:
        raise fail("device", "whole numbers, and at least one multiprocessor", device)
    return device


def _described(name: str, x: Any, q: Tensor) -> Any:
    """A tensor on "meta" of x's shape, strides and dtype, so that checks and casts launch nothing."""
    if not isinstance(x, Tensor) or not isinstance(q, Tensor):
        return x  # the checks say what is wrong
    check_layout(name, x)
    if x.device != q.device:
        raise fail(name, f"q's device {q.device}", x.device)
    dtype, kind = x.dtype, q.device.type
    cast = name in ("q", "k", "v") and x.is_floating_point() and dtype != torch.float64
    if cast and kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta")
