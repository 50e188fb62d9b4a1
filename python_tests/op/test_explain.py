"""rebased_cuda.explain: which kernels a call would take, and why, on machines with a GPU and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import needs_kernels
from problems import MAPS, NORMS, Problem, run

from rebased_cuda import DeviceLimits, RebasedState, explain, rebased_attention, testing

H100 = DeviceLimits(132, (9, 0), 227 << 10)
RTX = DeviceLimits(82, (8, 6), 99 << 10)


def _call(**changes: Any) -> dict[str, Any]:
    sizes = {"batch": 2, "heads": 4, "kv_heads": 4, "seqlen": 4096, "dim": 16, "width": 64} | {
        name: changes.pop(name)
        for name in ("batch", "heads", "kv_heads", "seqlen", "dim", "width")
        if name in changes
    }
    dtype = changes.pop("dtype", torch.bfloat16)

    def rows(heads: int, width: int) -> torch.Tensor:
        return torch.empty(sizes["batch"], heads, sizes["seqlen"], width, dtype=dtype, device="meta")

    q, k = rows(sizes["heads"], sizes["dim"]), rows(sizes["kv_heads"], sizes["dim"])
    return {"q": q, "k": k, "v": rows(sizes["kv_heads"], sizes["width"]), "device": H100} | changes


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("layer_norm", NORMS, ids=str)
def test_tensor_cores_have_no_reason_against_them(feature_map, layer_norm):
    found = explain(**_call(feature_map=feature_map, layer_norm=layer_norm))
    for direction in (found.forward, found.backward):
        assert direction.path == "tensor_core"
        assert direction.reasons == ()
    assert str(found).count("tensor cores") == 2


@pytest.mark.parametrize(
    ("changes", "path", "arguments"),
    [
        ({"dtype": torch.float32}, "float32", ["q"]),
        ({"dtype": torch.float16}, "general", ["q"]),
        ({"dtype": torch.float64, "seqlen": 64}, "quadratic", ["q"]),
        ({"dim": 24}, "general", ["q"]),
        ({"dim": 32, "feature_map": "square"}, "general", ["q"]),
        ({"heads": 34, "kv_heads": 2}, "general", ["k"]),
        ({"dtype": torch.float32, "width": 40, "dim": 24}, "general", ["q", "q"]),
    ],
)
def test_each_argument_that_stands_in_the_way_is_named(changes, path, arguments):
    found = explain(**_call(**changes)).forward
    assert found.path == path
    assert [reason.argument for reason in found.reasons] == arguments
    for reason in found.reasons:
        assert str(reason) in str(found)
        assert reason.remedy in str(reason)


def test_a_remedy_helps():
    assert explain(**_call(heads=34, kv_heads=2)).forward.path == "general"
    assert explain(**_call(heads=34, kv_heads=17)).forward.path == "tensor_core"
    assert explain(**_call(dtype=torch.float16)).forward.path == "general"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = torch.empty(2, 4, 4096, 16)
        found = explain(q, q, torch.empty(2, 4, 4096, 64), device=H100)
        assert found.forward.path == "tensor_core"
        assert q.dtype == torch.float32


def test_a_device_may_be_too_small():
    call = _call(dim=32)
    assert explain(**call).backward.path == "tensor_core"
    found = explain(**{**call, "device": RTX})
    assert found.forward.path == "tensor_core"
    assert found.backward.path == "general"
    assert [reason.argument for reason in found.backward.reasons] == ["device"]


def test_a_device_may_be_a_mapping():
    limits = {"multiprocessors": 132, "compute_capability": (9, 0), "shared_memory_per_block": 227 << 10}
    assert explain(**_call(device=limits)) == explain(**_call())


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("dtype", "batch", "seqlen"), [("bfloat16", 8, 4096), ("float32", 1, 131072)])
def test_it_is_the_plan_of_the_call(direction, dtype, batch, seqlen):
    found = explain(
        **_call(dtype=getattr(torch, dtype), batch=batch, seqlen=seqlen, heads=12, kv_heads=12),
        gamma_q=torch.empty(12, 16, device="meta"),
        beta_q=torch.empty(16, device="meta"),
        gamma_k=torch.empty(16, device="meta"),
        beta_k=torch.empty(16, device="meta"),
        layer_norm="token",
    )
    plan = testing.plan(direction, dtype=dtype, batch=batch, seqlen=seqlen)
    got = getattr(found, direction)
    assert (got.path, got.segments) == (plan["path"], plan["segments"])
    assert (got.workspace_bytes, got.kept_bytes) == (plan["workspace.bytes"], 0)


@needs_kernels
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("packed", [(), (0, 40, 40, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_what_a_call_does(dtype, packed, requires_grad, kernel_device):
    problem = Problem(
        seqlen=130, batch=1, feature_dim=16, head_dim=64, dtype=dtype, packed=packed, with_state=True
    ).but(device=kernel_device)
    *inputs, kv, k_sum = problem.inputs(requires_grad)
    limits = DeviceLimits.of(torch.device(kernel_device))
    state = RebasedState(kv, k_sum)
    found = explain(*inputs, **problem.options(), initial_state=state, return_state=True, device=limits)
    testing.record_launches(True)
    try:
        y = run(rebased_attention, [*inputs, kv, k_sum], problem)[0]
        kept = y.grad_fn.saved_tensors[-1].numel() if requires_grad else 0
        if requires_grad:
            y.sum().backward()
        launched = testing.take_recorded_launches()
    finally:
        testing.record_launches(False)
    assert len(launched) == 1 + requires_grad
    for text, direction in zip(launched, (found.forward, found.backward), strict=False):
        assert direction.path == text.split()[1]
    assert found.forward.kept_bytes == kept


def test_strides_count():
    """Rows that the op copies first, and rows too far apart for tensor cores."""
    call = _call()
    call["q"] = torch.empty(2, 4, 4096, 17, dtype=torch.bfloat16, device="meta")[..., :16]
    assert explain(**call).forward.path == "tensor_core"
    strides = (2**34, 2**32, 16, 1)
    far = torch.empty_strided((2, 4, 4096, 16), strides, dtype=torch.bfloat16, device="meta")
    found = explain(**{**call, "q": far}).forward
    assert found.path == "general"
    assert "2^31" in str(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": None}, "device: expected the limits of a GPU"),
        ({"device": {"multiprocessors": 1}}, "device: expected the names multiprocessors"),
        ({"device": DeviceLimits(0, (9, 0), 1 << 16)}, "device: expected whole numbers"),
        ({"device": 132}, "device: expected DeviceLimits"),
        ({"feature_map": "cube"}, "feature_map"),
        ({"gamma_q": torch.empty(16)}, "gamma_q: expected q's device"),
        ({"width": 300}, "v: expected a head dim"),
        ({"q": [1]}, "q: expected a torch.Tensor"),
        ({"return_state": 1}, "return_state: expected a bool"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        explain(**_call(**changes))
