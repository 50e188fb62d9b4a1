"""A short speed table: the op against what one would run without it, here, in one interleaved run."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..attention import rebased_attention
from . import baselines
from .checks import FEATURE_DIM, HEAD_DIM, HEADS, REFERENCE_CHUNK, SEQLEN, inputs
from .report import Report
from .timing import available_memory, interleave, once, ratio, relative_error

ROUNDS = 7
QUADRATIC_ROUNDS = 2  # of these, with the quadratic form: it takes seconds
METHODS = ("rebased_cuda", "PyTorch chunked, loop", "PyTorch chunked, cumsum", "PyTorch quadratic")
SDPA = "scaled_dot_product_attention"
OURS, QUADRATIC = METHODS[0], METHODS[3]
PEER_BOUND = 1e-4  # the peers are float32 too; this is to see that they compute the same thing

Function = Callable[..., Tensor]
Case = tuple[Function, list[Tensor]]


def _projections(device: str) -> list[Tensor]:
    """q, k (1, N, H*d), v (1, N, H*dv) as a model's projections leave them, and gamma, beta (H, d)."""
    q, k, v, *affine = (x.detach() for x in inputs(device, torch.float32))
    flat = (x.transpose(1, 2).flatten(2).contiguous() for x in (q, k, v))
    return [x.requires_grad_() for x in (*flat, *affine)]


def _ours(q: Tensor, k: Tensor, v: Tensor, *affine: Tensor, feature_map: str) -> Tensor:
    q, k, v = (torch.unflatten(x, -1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    return rebased_attention(q, k, v, *affine, feature_map=feature_map, layer_norm="token")


def _both(function: Function, tensors: list[Tensor], grad_y: Tensor) -> None:
    torch.autograd.grad(function(*tensors), tensors, grad_y)


def _forward(function: Function, tensors: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return function(*tensors)


def _quadratic_fits(device: str) -> bool:
    matrices = 6 * HEADS * SEQLEN**2 * 4  # what forward and backward hold at once
    memory = torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory()
    return memory > 1.5 * matrices


def _fastest_chunk(function: Function, tensors: list[Tensor], grad_y: Tensor, device: str) -> Function:
    """The chunked form with the chunk length that is fastest here, forward and backward."""
    forms = [functools.partial(function, chunk=chunk) for chunk in baselines.CHUNKS]

    def seconds(form: Function) -> float:
        return min(once(functools.partial(_both, form, tensors, grad_y), device) for _ in range(2))

    return min(forms, key=seconds)


def _cases(report: Report, device: str, feature_map: str, grad_y: Tensor) -> dict[str, Case]:
    """What is timed for one feature map, each checked against the float64 reference first."""
    tensors = _projections(device)
    functions: dict[str, Function] = {OURS: functools.partial(_ours, feature_map=feature_map)}
    for name, form in zip(METHODS[1:3], (baselines.chunked_loop, baselines.chunked_cumsum), strict=True):
        report.progress(f"{feature_map}: {name}, choosing its chunk length")
        form = functools.partial(form, feature_map=feature_map)
        functions[name] = _fastest_chunk(form, tensors, grad_y, device)
    if _quadratic_fits(device):
        functions[QUADRATIC] = functools.partial(baselines.quadratic, feature_map=feature_map)
    else:
        report.say(f"  {QUADRATIC}: left out, too little free memory for its {SEQLEN} x {SEQLEN} matrices")
    report.progress(f"{feature_map}: checking what is timed")
    q, k, v, *affine = (x.detach().double() for x in inputs(device, torch.float32))
    expected = reference.chunked(
        q, k, v, *affine, chunk=REFERENCE_CHUNK, feature_map=feature_map, layer_norm="token"
    )
    assert isinstance(expected, Tensor)
    for name, function in functions.items():
        error = relative_error(_forward(function, tensors), expected)
        if not error <= PEER_BOUND:
            report.check(f"speed: {feature_map}: {name} computes the same", error, PEER_BOUND)
    return {name: (function, tensors) for name, function in functions.items()}


def _time(
    report: Report, device: str, cases: dict[str, Case], grad_y: Tensor, title: str
) -> list[dict[str, Any]]:
    """Forward, then forward + backward, of all methods in turn."""
    results = []
    for direction in ("forward", "forward + backward"):
        runs: dict[str, Callable[[], Any]] = {}
        for name, (function, tensors) in cases.items():
            rest = (function, tensors)
            runs[name] = functools.partial(_forward, *rest)
            if direction != "forward":
                runs[name] = functools.partial(_both, *rest, grad_y)
        for name, run in runs.items():
            if name != QUADRATIC:  # its check was a warm-up of seconds already
                report.progress(f"{title}, {direction}: warm-up of {name}")
                run()

        def told(number: int, name: str, direction: str = direction) -> None:
            report.progress(f"{title}, {direction}: round {number + 1}, {name}")

        seconds = interleave(runs, QUADRATIC_ROUNDS, device, told)
        quick = {name: run for name, run in runs.items() if name != QUADRATIC}
        more = interleave(quick, ROUNDS - QUADRATIC_ROUNDS, device, told)
        for name in seconds:
            seconds[name] += more.get(name, [])
            results.append(
                {
                    "case": title,
                    "direction": direction,
                    "method": name,
                    "seconds": seconds[name],
                    "median": statistics.median(seconds[name]),
                    "ratio": ratio(seconds[name], seconds[OURS]),
                }
            )
    return results


def speed(report: Report, device: str) -> None:
    torch.manual_seed(0)
    grad_y = torch.randn(1, HEADS, SEQLEN, HEAD_DIM, device=device)
    softmax = [torch.randn(1, HEADS, SEQLEN, HEAD_DIM, device=device).requires_grad_() for _ in range(3)]
    results: list[dict[str, Any]] = []
    for feature_map in ("outer", "square"):
        cases = _cases(report, device, feature_map, grad_y)
        cases[SDPA] = (baselines.softmax_attention, softmax)
        results += _time(report, device, cases, grad_y, feature_map)
    report.results["speed"] = results
    for feature_map in ("outer", "square"):
        rows = []
        for name in (*METHODS, SDPA):
            found = [r for r in results if (r["case"], r["method"]) == (feature_map, name)]
            row = [name]
            for result in found:
                row += [f"{result['median'] * 1e3:.1f}", f"{result['ratio']:.1f}x"]
            rows.append(row if found else [name, *["not run", "-"] * 2])
        threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
        report.table(
            f"{feature_map}: float32, {HEADS} heads, d {FEATURE_DIM}, dv {HEAD_DIM}, N {SEQLEN}{threads}; "
            "medians, time over ours",
            ["", "forward ms", "", "forward + backward ms", ""],
            rows,
        )
    report.say(
        "  LayerNorm, gamma, beta, feature map and division are counted on both sides; "
        f"{SDPA}: causal, head dim 64. Chunked PyTorch with its best chunk length of "
        f"{', '.join(map(str, baselines.CHUNKS))}."
    )
