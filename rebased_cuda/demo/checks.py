"""The op against the float64 reference at a real model's size, its gradients against finite differences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..attention import rebased_attention, rebased_attention_step
from ..state import FEATURE_MAPS, RebasedState
from .report import Report
from .timing import relative_error

HEADS, FEATURE_DIM, HEAD_DIM, SEQLEN = 12, 16, 64, 4096
DECODED = 64  # the last tokens, one by one, after a prefill of the others
REFERENCE_CHUNK = 256
GRADCHECK_SEQLEN = 67  # more than the longest chunk, and ragged

FORWARD_BOUND = 5e-6
BACKWARD_BOUND = 2e-5
BACKWARD_FACTOR = 2.0  # or this many times the error of plain float32 PyTorch, where that is more
FLOAT64_BOUND = 1e-12

NAMES = ("q", "k", "v", "gamma_q", "beta_q", "gamma_k", "beta_k")


def inputs(
    device: str,
    dtype: torch.dtype,
    batch: int = 1,
    heads: int = HEADS,
    kv_heads: int = HEADS,
    seqlen: int = SEQLEN,
    feature_dim: int = FEATURE_DIM,
    head_dim: int = HEAD_DIM,
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v, gamma_q, beta_q, gamma_k, beta_k as leaves that require grad."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [
        (batch, heads, seqlen, feature_dim),
        (batch, kv_heads, seqlen, feature_dim),
        (batch, kv_heads, seqlen, head_dim),
        *[(heads, feature_dim)] * 2,
        *[(kv_heads, feature_dim)] * 2,
    ]
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    for index, mean in zip(range(3, 7), (1.0, 0.2, 1.0, 0.2), strict=True):
        tensors[index] = mean + 0.3 * tensors[index]
    return [x.to(dtype).to(device).requires_grad_() for x in tensors]


def accuracy(report: Report, device: str, feature_map: str, seqlen: int = SEQLEN) -> None:
    """Forward, backward and prefill -> decode in float32, forward in float64."""
    options: dict[str, Any] = {"feature_map": feature_map, "layer_norm": "token"}
    single = inputs(device, torch.float32, seqlen=seqlen)
    double = [x.detach().double().requires_grad_() for x in single]
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(1, HEADS, seqlen, HEAD_DIM, generator=generator).to(device)

    def judge(tensors: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        y = reference.chunked(*tensors, chunk=REFERENCE_CHUNK, **options)
        assert isinstance(y, Tensor)
        return y.detach(), torch.autograd.grad(y, tensors, grad_y.to(y.dtype))

    report.progress(f"{feature_map}: the reference in float64")
    expected, expected_gradients = judge(double)
    report.progress(f"{feature_map}: plain PyTorch in float32")
    _, plain_gradients = judge(single)

    report.progress(f"{feature_map}: the op")
    y = rebased_attention(*single, **options)
    gradients = torch.autograd.grad(y, single, grad_y)
    report.check(f"{feature_map} forward float32", relative_error(y, expected), FORWARD_BOUND)
    worst = (0.0, "", 1.0, 0.0)  # error / bound, whose gradient, bound, error
    rows = zip(NAMES, gradients, plain_gradients, expected_gradients, strict=True)
    for name, gradient, plain, exact in rows:
        bound = max(BACKWARD_BOUND, BACKWARD_FACTOR * relative_error(plain, exact))
        error = relative_error(gradient, exact)
        # NaN must win every comparison
        if not error / bound <= worst[0]:
            worst = (error / bound, name, bound, error)
    name, bound, error = worst[1:]
    report.check(f"{feature_map} backward float32", error, bound, f"worst of 7 gradients ({name})")
    with torch.no_grad():
        in_double = rebased_attention(*double, **options)
        report.check(f"{feature_map} forward float64", relative_error(in_double, expected), FLOAT64_BOUND)
        decoded = _hand_over(single, options)
    error = relative_error(decoded, expected[:, :, -DECODED:])
    report.check(
        f"{feature_map} prefill of {seqlen - DECODED}, then {DECODED} steps, float32", error, FORWARD_BOUND
    )


def _hand_over(tensors: list[Tensor], options: dict[str, Any]) -> Tensor:
    """y (B, H, DECODED, dv) of the last tokens, by the step from a prefill's state."""
    q, k, v, *affine = tensors
    prompt = (x[:, :, :-DECODED] for x in (q, k, v))
    _, state = rebased_attention(*prompt, *affine, **options, return_state=True)
    rows = []
    for position in range(q.shape[2] - DECODED, q.shape[2]):
        q_t, k_t, v_t = (x[:, :, position] for x in (q, k, v))
        rows.append(rebased_attention_step(q_t, k_t, v_t, state, *affine, **options))
    return torch.stack(rows, 2)


def gradcheck(report: Report, device: str) -> None:
    """Every feature map x normalisation in float64: grouped heads, a state in and out, several chunks."""
    for feature_map in FEATURE_MAPS:
        for layer_norm in (None, "token", "head"):
            name = f"gradcheck {feature_map}, layer_norm={layer_norm}"
            report.progress(name)
            try:
                torch.autograd.gradcheck(*_gradcheck_case(device, feature_map, layer_norm))
            except (RuntimeError, ValueError) as error:  # gradcheck's own, and the op's
                report.verdict(name, False, " ".join(str(error).split())[:300])
            else:
                report.verdict(name, True, "analytic = numerical gradients of y and the state, float64")


def _gradcheck_case(device: str, feature_map: str, layer_norm: str | None) -> tuple[Any, list[Tensor]]:
    options: dict[str, Any] = {"feature_map": feature_map, "layer_norm": layer_norm, "eps": 1e-3}
    sizes: dict[str, int] = {"heads": 2, "kv_heads": 1, "feature_dim": 3, "head_dim": 2}
    before = inputs(device, torch.float64, **sizes, seqlen=9, seed=1)
    with torch.no_grad():  # of a real prefix, so that the denominator stays positive
        _, state = reference.quadratic(*before, **options, return_state=True)
    tensors = inputs(device, torch.float64, **sizes, seqlen=GRADCHECK_SEQLEN)
    tensors += [x.contiguous().requires_grad_() for x in state]

    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        *call, kv, k = arguments
        y, final = rebased_attention(*call, **options, initial_state=RebasedState(kv, k), return_state=True)
        return y, *final

    return run, tensors
