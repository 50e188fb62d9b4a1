"""A sequence over several processes gives what one process gives: values, gradients, states, layers."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import EMULATED
from problems import MAPS, NORMS, Problem, plain_low_precision, relative_error, run_reference
from processes import Processes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.profiler import ProfilerActivity, profile

from rebased_cuda import GatedShortConvolution, ReBasedAttention, RebasedState, rebased_attention, reference
from rebased_cuda.context_parallel import (
    StateExchange,
    begin_exchange,
    context_parallel_rebased_attention,
    context_parallelize,
)
from rebased_cuda.context_parallel import attention as module

ROOT = Path(__file__).parents[2]
SHARDS = {2: ((24, 24), (31, 17), (0, 48)), 4: ((12, 12, 12, 12), (3, 0, 25, 20), (48, 0, 0, 0))}
PACKED = (2, 2, 7, 24, 30, 30, 41, 46)  # an empty sequence, borders on and off the shards', rows in none
VARIANTS = {
    "plain": {},
    "grouped": {"kv_heads": 2},
    "state": {"with_state": True},
    "packed": {"packed": PACKED, "batch": 1},
    "packed grouped state": {"packed": PACKED, "batch": 1, "kv_heads": 2, "with_state": True},
    "unnormalised": {"normalize": False, "affine": "shared"},
}
if EMULATED:  # the same code over the CUDA kernels: a few cases are enough
    VARIANTS = {name: VARIANTS[name] for name in ("plain", "packed grouped state")}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    processes = Processes(request.param)
    yield processes
    processes.stop()


@pytest.fixture(scope="module")
def two_processes() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.stop()


# ---- what runs on every rank ----


def _shard(inputs: list[Tensor | None], lengths: tuple[int, ...]) -> list[Tensor | None]:
    """This rank's rows of q, k, v, and the parameters and states whole, as leaves of their own."""
    rank = dist.get_rank()
    rows = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    return [
        x if x is None else (x[:, :, rows] if i < 3 else x).detach().clone().requires_grad_()
        for i, x in enumerate(inputs)
    ]


def _call(function: Any, inputs: list[Tensor | None], problem: Problem, **more: Any) -> Any:
    *call, kv, k = inputs
    state = None if kv is None else RebasedState(kv, k)
    return function(*call, initial_state=state, **problem.options(), **more)


def _random(shape: torch.Size, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _errors(
    problem: Problem, lengths: tuple[int, ...], return_state: bool, judge: Any = rebased_attention
) -> dict[str, float]:
    """Relative errors of this rank's results and gradients against `judge` on one process (float64 inputs for
    the reference). Every rank's loss reads its own copy of the state, rank r's r + 1 times."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs = problem.inputs(requires_grad=True)
    mine = _shard(inputs, lengths)
    if judge is not rebased_attention:
        inputs = [x if x is None else x.detach().double().requires_grad_() for x in inputs]
    y, state = _call(judge, inputs, problem, return_state=True)
    grad_y = _random(y.shape, y.dtype, 1)
    grad_state = [_random(x.shape, x.dtype, 2) for x in state] if return_state else []
    loss = (y * grad_y).sum()
    times = sum(range(1, ranks + 1))
    loss = loss + times * sum((x * g).sum() for x, g in zip(state, grad_state, strict=bool(grad_state)))
    loss.backward()

    more = {"shard_lengths": lengths} if problem.packed else {}
    result = _call(context_parallel_rebased_attention, mine, problem, return_state=return_state, **more)
    my_y, my_state = result if return_state else (result, ())
    rows = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    loss = (my_y * grad_y[:, :, rows].to(my_y.dtype)).sum()
    loss = loss + (rank + 1) * sum(
        (x * g.to(x.dtype)).sum() for x, g in zip(my_state, grad_state, strict=True)
    )
    loss.backward()

    errors = {"y": relative_error(my_y.detach(), y.detach()[:, :, rows])}
    for name, x, expected in zip(("kv", "k"), my_state, state, strict=bool(my_state)):
        errors[name] = relative_error(x.detach(), expected.detach())
    names = ("q", "k", "v", "gamma_q", "beta_q", "gamma_k", "beta_k", "initial kv", "initial k")
    for i, (name, x, expected) in enumerate(zip(names, mine, inputs, strict=True)):
        if x is None:
            continue
        assert x.grad is not None
        assert expected.grad is not None
        gradient = x.grad.clone()
        if i >= 3:
            dist.all_reduce(gradient)
        errors[f"grad {name}"] = relative_error(
            gradient, expected.grad[:, :, rows] if i < 3 else expected.grad
        )
    return errors


# ---- the function ----


@pytest.mark.parametrize("return_state", [False, True], ids=["y", "y and state"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("feature_map", MAPS)
def test_float64_is_that_of_one_process(processes, feature_map, variant, return_state):
    for shards, layer_norm in zip(SHARDS[processes.ranks], NORMS, strict=True):
        problem = Problem(feature_map, layer_norm, seqlen=48, **VARIANTS[variant])
        for errors in processes.run(_errors, problem, shards, return_state):
            assert max(errors.values()) <= 1e-12, (shards, layer_norm, errors)


@pytest.mark.parametrize("layer_norm", NORMS)
def test_every_way_to_cut(two_processes, layer_norm):
    """A border at every row of packed sequences, with their states."""
    problem = Problem("outer", layer_norm, seqlen=17, packed=(1, 4, 4, 11, 15), batch=1, with_state=True)
    for first in range(18):
        for errors in two_processes.run(_errors, problem, (first, 17 - first), first % 2 == 0):
            assert max(errors.values()) <= 1e-12, (first, errors)


def _float32_errors(problem: Problem, lengths: tuple[int, ...]) -> list[tuple[str, float, float]]:
    """(name, our error, plain PyTorch's in float32) against the float64 reference."""
    plain = [x if x is None else x.requires_grad_() for x in problem.inputs()]
    exact = [x if x is None else x.detach().double().requires_grad_() for x in problem.inputs()]
    for inputs in (plain, exact):
        y = _call(reference.chunked, inputs, problem)
        (y * _random(y.shape, y.dtype, 1)).sum().backward()
    ours = _errors(problem, lengths, False, judge=reference.chunked)
    names = ("q", "k", "v", "gamma_q", "beta_q", "gamma_k", "beta_k")
    result = [("y", ours["y"], 0.0)]
    for name, x, expected in zip(names, plain, exact, strict=False):
        assert x is not None
        assert expected is not None
        result.append((name, ours[f"grad {name}"], relative_error(x.grad, expected.grad)))
    return result


@pytest.mark.parametrize("feature_map", MAPS)
def test_float32_error(two_processes, feature_map):
    problem = Problem(feature_map, seqlen=600, feature_dim=16, head_dim=32, dtype=torch.float32)
    for errors in two_processes.run(_float32_errors, problem, (250, 350)):
        for name, error, plain in errors:
            assert error <= (5e-6 if name == "y" else max(2e-5, 2 * plain)), (name, error, plain)


def _low_precision_errors(problem: Problem, lengths: tuple[int, ...]) -> tuple[float, float]:
    """Errors of y over all ranks: ours and plain PyTorch's in the same dtype."""
    inputs = problem.inputs()
    expected = run_reference(inputs, problem)[0]
    shard = [x if x is None else x.detach() for x in _shard(inputs, lengths)]
    y = _call(context_parallel_rebased_attention, shard, problem)
    whole: list[Any] = [None] * len(lengths)
    dist.all_gather_object(whole, y)
    plain = plain_low_precision(*inputs[:7], problem=problem)
    return relative_error(torch.cat(whole, 2), expected), relative_error(plain, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature_map", ["outer", "square"])
def test_low_precision_error(two_processes, feature_map, dtype):
    problem = Problem(
        feature_map, batch=1, seqlen=150, feature_dim=16, head_dim=16, affine="none", eps=1e-2, dtype=dtype
    )
    ratios = []
    for seed in range(20):
        ours, plain = two_processes.run(_low_precision_errors, problem.but(seed=seed), (70, 80))[0]
        ratios.append(ours / plain)
    assert statistics.median(ratios) <= 1.25


def _twice(problem: Problem, lengths: tuple[int, ...]) -> bool:
    results = []
    for _ in range(2):
        shard = _shard(problem.inputs(), lengths)
        y, state = _call(context_parallel_rebased_attention, shard, problem, return_state=True)
        (y.square().sum() + state.kv.sum()).backward()
        results.append([y, *state, *(x.grad for x in shard if x is not None)])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_repeatable_and_the_same_state_everywhere(processes):
    lengths = SHARDS[processes.ranks][1]
    problem = Problem(seqlen=48, dtype=torch.float32, with_state=True)
    assert all(processes.run(_twice, problem, lengths))
    states = processes.run(_final_state, problem, lengths)
    assert all(state == states[0] for state in states)


def _final_state(problem: Problem, lengths: tuple[int, ...]) -> list[float]:
    _, state = _call(
        context_parallel_rebased_attention, _shard(problem.inputs(), lengths), problem, return_state=True
    )
    return state.kv.flatten().tolist() + state.k.flatten().tolist()


# ---- what it costs ----


def _traffic(problem: Problem, return_state: bool) -> list[list[int]]:
    """Bytes of each all_gather's message, forward and backward; anything else that is sent is an error."""
    sent: list[int] = []
    original = dist.all_gather

    def counted(gathered: Any, message: Tensor, **options: Any) -> Any:
        sent.append(message.numel() * message.element_size())
        return original(gathered, message, **options)

    lengths = (problem.seqlen // dist.get_world_size(),) * dist.get_world_size()
    with (
        pytest.MonkeyPatch.context() as patch,
        profile(activities=[ProfilerActivity.CPU]) as profiler,
    ):
        patch.setattr(dist, "all_gather", counted)
        result = _call(
            context_parallel_rebased_attention,
            _shard(problem.inputs(), lengths),
            problem,
            return_state=return_state,
            **({"shard_lengths": lengths} if problem.packed else {}),
        )
        forward, sent[:] = list(sent), []
        y, kv = (result[0], result[1].kv) if return_state else (result, None)
        (y.sum() if kv is None else y.sum() + kv.sum()).backward()
    operations = [event.name for event in profiler.events() if event.name.startswith("c10d::")]
    assert operations == ["c10d::allgather_"] * (len(forward) + len(sent)), operations
    return [forward, sent]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_collective_of_one_state_whatever_n_is(processes, dtype):
    for seqlen in (64, 4096):
        problem = Problem(batch=1, seqlen=seqlen, feature_dim=16, head_dim=8, kv_heads=2, dtype=dtype)
        state = 4 * problem.kv_heads * 136 * (problem.head_dim + 1)
        for forward, backward in processes.run(_traffic, problem, False):
            assert len(forward) == len(backward) == 1
            assert forward[0] <= 1.1 * state
            assert backward[0] <= 1.1 * state
        for forward, backward in processes.run(_traffic, problem, True):  # and the final state's gradient
            assert len(forward) == len(backward) == 1
            assert forward[0] <= 1.1 * state
            assert backward[0] <= 2.2 * state


def test_packed_sequences_exchange_one_state(processes):
    problem = Problem(batch=1, seqlen=64, packed=tuple(range(0, 65, 8)), feature_dim=16, head_dim=8)
    state = 8 * problem.kv_heads * 136 * (problem.head_dim + 1)
    for directions in processes.run(_traffic, problem, False):
        assert directions == [[state], [state]]


def _order() -> list[list[str]]:
    """What happens in which order, forward and backward."""
    events: list[str] = []
    original = module.ops

    class Ops:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> Any:
                events.append(arguments[-1] if name == "backward_with_state" else name)
                return getattr(original, name)(*arguments)

            return call

    class Exchange(module.Exchange):
        def __init__(self, *arguments: Any) -> None:
            events.append("send")
            super().__init__(*arguments)

        def wait(self) -> Any:
            events.append("wait")
            return super().wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ops", Ops())
        patch.setattr(module, "Exchange", Exchange)
        problem = Problem(seqlen=32, batch=1)
        y = _call(context_parallel_rebased_attention, _shard(problem.inputs(), (16, 16)), problem)
        forward, events[:] = list(events), []
        y.sum().backward()
        backward, events[:] = list(events), []
        layer = context_parallelize(ReBasedAttention(6, 2, 3))
        for name in ("proj_q", "proj_k", "proj_v", "proj_o"):
            getattr(layer, name).register_forward_hook(lambda *_, name=name: events.append(name))
        layer(torch.randn(1, 16, 6))
    return [forward, backward, events]


def test_the_exchange_goes_on_behind_computation(two_processes):
    first, second = two_processes.run(_order)
    backward = ["reverse_state", "send", "queries", "wait", "keys"]
    layer = ["proj_k", "proj_v", "forward_state", "send", "proj_q"]
    assert first == [
        ["forward_state", "send", "forward_with_state", "wait"],
        backward,
        [*layer, "forward_with_state", "wait", "proj_o"],
    ]
    assert second == [
        ["forward_state", "send", "wait", "forward_with_state"],
        backward,
        [*layer, "wait", "forward_with_state", "proj_o"],
    ]


def _begun_early(problem: Problem, lengths: tuple[int, ...], return_state: bool) -> None:
    """The same bits, values and gradients, as of a call that begins the exchange itself."""
    results = []
    for early in (False, True):
        mine = _shard(problem.inputs(), lengths)
        options = {"return_state": return_state, "shard_lengths": lengths if problem.packed else None}
        if early:
            names = ("feature_map", "layer_norm")
            given = {name: problem.options()[name] for name in names} | options
            if problem.packed:
                given["cu_seqlens"] = options["cu_seqlens"] = problem.options()["cu_seqlens"]
            options["exchange"] = begin_exchange(mine[1], mine[2], mine[5], mine[6], **given)
        *call, kv, k = mine
        state = None if kv is None else RebasedState(kv, k)
        whole = {**problem.options(), **options}
        result = context_parallel_rebased_attention(*call, initial_state=state, **whole)
        outputs = [result[0], *result[1]] if return_state else [result]
        gradients = torch.autograd.grad(
            sum(x.square().sum() for x in outputs), [x for x in mine if x is not None]
        )
        results.append([*outputs, *gradients])
        if early:
            with pytest.raises(ValueError, match="exchange: was given to a call before"):
                context_parallel_rebased_attention(*call, initial_state=state, **whole)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exchange_begun_early(processes, variant, return_state):
    problem = Problem(seqlen=48, **VARIANTS[variant])
    processes.run(_begun_early, problem, SHARDS[processes.ranks][1], return_state)


# ---- groups and mistakes ----


def _over_a_mesh(problem: Problem) -> float:
    """On a mesh of (1, 2): its dimension "context"."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "context"))
    half = problem.seqlen // dist.get_world_size()
    shard = _shard(problem.inputs(), (half,) * dist.get_world_size())
    y = _call(context_parallel_rebased_attention, shard, problem, group=mesh["context"])
    expected = _call(rebased_attention, problem.inputs(), problem)
    with pytest.raises(ValueError, match=r"mesh\['its name'\]"):
        _call(context_parallel_rebased_attention, shard, problem, group=mesh)
    rows = slice(half * dist.get_rank(), half * (dist.get_rank() + 1))
    return relative_error(y.detach(), expected[:, :, rows])


def test_device_mesh(two_processes):
    assert max(two_processes.run(_over_a_mesh, Problem(seqlen=48))) <= 1e-12


def _groups_of_one_half() -> None:
    """Two groups of half the ranks each work side by side."""
    rank, half = dist.get_rank(), dist.get_world_size() // 2
    groups = [dist.new_group(list(range(i * half, (i + 1) * half))) for i in range(2)]
    problem = Problem(seqlen=20 * half, seed=rank // half)
    inputs = problem.inputs()
    expected = _call(rebased_attention, inputs, problem)
    rows = slice(rank % half * 20, (rank % half + 1) * 20)
    mine = [x if x is None or i > 2 else x[:, :, rows] for i, x in enumerate(inputs)]
    y = _call(context_parallel_rebased_attention, mine, problem, group=groups[rank // half])
    assert relative_error(y, expected[:, :, rows]) <= 1e-12
    with pytest.raises(TypeError, match="group: expected a ProcessGroup that this process is in"):
        _call(context_parallel_rebased_attention, mine, problem, group=groups[1 - rank // half])


def test_subgroups(processes):
    processes.run(_groups_of_one_half)


def _mistakes() -> None:
    problem = Problem(batch=1, seqlen=10, packed=(0, 7, 20))
    inputs = [x if x is None else x[:, :, :10] if i < 3 else x for i, x in enumerate(problem.inputs())]

    def call(**changes: Any) -> Any:
        return context_parallel_rebased_attention(*inputs[:7], **{**problem.options(), **changes})

    call()
    with pytest.raises(ValueError, match="shard_lengths: needed, as cu_seqlens ends at 19"):
        call(cu_seqlens=torch.tensor([0, 7, 19]))
    call(cu_seqlens=torch.tensor([0, 7, 19]), shard_lengths=[10, 10])
    with pytest.raises(ValueError, match="shard_lengths: expected 2 numbers"):
        call(shard_lengths=[10, 10, 10])
    with pytest.raises(ValueError, match=r"shard_lengths: expected 10 \(q's rows\) at this rank"):
        call(shard_lengths=[9, 9])
    with pytest.raises(ValueError, match="cu_seqlens: must not decrease"):
        call(cu_seqlens=torch.tensor([0, 12, 11, 20]))
    with pytest.raises(TypeError, match="group: expected a ProcessGroup"):
        call(group="all")
    with pytest.raises(ValueError, match="feature_map"):
        call(feature_map="cosine")
    assert call(cu_seqlens=torch.zeros(1, dtype=torch.int64), shard_lengths=[10, 10]).count_nonzero() == 0
    with pytest.raises(TypeError, match="exchange: expected what begin_exchange returned"):
        call(exchange="early")
    options = {"layer_norm": "token", "cu_seqlens": problem.options()["cu_seqlens"]}
    _, k, v, _, _, gamma_k, beta_k, *_ = inputs
    for changes in ({"layer_norm_eps": 1e-3}, {"return_state": True}, {"feature_map": "square"}, {}):
        begun = begin_exchange(k, v.clone() if not changes else v, gamma_k, beta_k, **{**options, **changes})
        with pytest.raises(ValueError, match="exchange: was begun with other k, v, parameters or options"):
            call(exchange=begun, cu_seqlens=options["cu_seqlens"])
    with pytest.raises(ValueError, match="v: expected k's 4 heads"):
        begin_exchange(k, v[:, :1], gamma_k, beta_k, **options)
    call(shard_lengths=[np.int64(10), np.int32(10)])
    call(shard_lengths=(10, 10), return_state=np.True_)


def test_mistakes_are_named_before_anything_is_sent(two_processes):
    two_processes.run(_mistakes)


WRONG_GROUPS = ("all", 1, [0], dist.GroupMember.NON_GROUP_MEMBER, object)
WRONG_LENGTHS = {
    TypeError: (
        20,
        10.0,
        "ab",
        b"ab",
        {10: 0, 20: 0},
        {10, 20},
        [10.0, 10],
        [True, 10],
        [None, 10],
        [[10], 10],
    ),
    ValueError: ([10], [10, 10, 10], [], [-10, 30], [9, 11], [10**30, 10**30]),
}


def _wrong_arguments() -> None:
    """Of every public function. Whatever one sent would meet the last call's message, and spoil it."""
    problem = Problem(batch=1, seqlen=10)
    q, k, v, gamma_q, _, gamma_k, *_ = problem.inputs()

    def attention(**changes: Any) -> Any:
        given = {"q": q, "k": k, "v": v, "gamma_q": gamma_q, "gamma_k": gamma_k, "layer_norm": "token"}
        return context_parallel_rebased_attention(**{**given, **changes})

    def begin(**changes: Any) -> Any:
        return begin_exchange(**{"k": k, "v": v, "gamma_k": gamma_k, "layer_norm": "token", **changes})

    def parallelize(**changes: Any) -> Any:
        return context_parallelize(**{"module": ReBasedAttention(6, 2, 3), **changes})

    outside = DeviceMesh("cpu", [1 - dist.get_rank()])
    for function in (attention, begin, parallelize):
        for group in (*WRONG_GROUPS, outside):
            with pytest.raises(TypeError, match=r"^group: expected a ProcessGroup that this process is in"):
                function(group=group)
    for function in (attention, begin):
        for cu_seqlens in (None, torch.tensor([0, 7, 20])):
            for error, wrong in WRONG_LENGTHS.items():
                for lengths in wrong:
                    with pytest.raises(error, match=r"^shard_lengths: expected"):
                        function(shard_lengths=lengths, cu_seqlens=cu_seqlens)
        wrong_options = {
            "feature_map": (None, "cosine", ["outer"]),
            "layer_norm": (True, "batch", ["token"]),
            "layer_norm_eps": (-1, "1", None, float("nan")),
            "return_state": (None, 1, "yes"),
            "cu_seqlens": (
                [0, 20],
                torch.tensor([0.0, 20.0]),
                torch.tensor([[0, 20]]),
                torch.tensor([0, 21]),
            ),
            "gamma_k": (1.0, gamma_k[:, 1:], gamma_k.long(), gamma_k.to("meta")),
            "k": (None, k.numpy(), k[0], k.long(), k.to_sparse(), k[..., :0], k[:, :0]),
            "v": (None, v.numpy(), v[0], v.float(), v.to_sparse(), v[:, :, 1:], v[..., :0], v.to("meta")),
        }
        for name, values in wrong_options.items():
            for value in values:
                with pytest.raises(
                    (TypeError, ValueError), match=rf"^({name}|shard_lengths: needed)\b"
                ) as caught:
                    function(**{name: value})
                assert function is attention or not re.search(r"\bH?q\b", str(caught.value))
    for wrong in ("scale", "eps"):
        for value in ("1", float("nan"), [1.0]):
            with pytest.raises((TypeError, ValueError), match=f"^{wrong}: expected"):
                attention(**{wrong: value})
    for wrong in (1, "early", (None,), StateExchange):
        with pytest.raises(TypeError, match=r"^exchange: expected what begin_exchange returned"):
            attention(exchange=wrong)
    for wrong in (None, "model", [ReBasedAttention(6, 2, 3)], ReBasedAttention):
        with pytest.raises(TypeError, match=r"^module: expected a torch\.nn\.Module"):
            parallelize(module=wrong)
    expected = rebased_attention(q, k, v, gamma_q, gamma_k=gamma_k, layer_norm="token")
    if dist.get_rank() == 0:  # whose rows come first
        assert relative_error(attention(), expected) <= 1e-12
    else:
        attention()


def test_every_function_names_its_wrong_arguments(two_processes):
    two_processes.run(_wrong_arguments)


def test_without_a_process_group():
    x = torch.zeros(1, 1, 4, 2)
    with pytest.raises(RuntimeError, match="init_process_group"):
        context_parallel_rebased_attention(x, x, x)


def _second_derivative() -> None:
    problem = Problem(seqlen=16, batch=1)
    shard = _shard(problem.inputs(), (8, 8))
    y = _call(context_parallel_rebased_attention, shard, problem)
    (gradient,) = torch.autograd.grad(y.square().sum(), shard[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.sum().backward()


def test_second_derivatives_raise(two_processes):
    two_processes.run(_second_derivative)


# ---- the layers ----


def _layers(lengths: tuple[int, ...], layer_norm: str | None, kernel_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        GatedShortConvolution(6, kernel_size),
        ReBasedAttention(6, 2, 3, layer_norm=layer_norm, eps=1e-3),
        GatedShortConvolution(6, kernel_size),
    ).double()
    x = torch.randn(2, sum(lengths), 6, dtype=torch.float64)
    grad_y = torch.randn_like(x)
    (model(x) * grad_y).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    y = model(x).detach()
    _, state = model[1].prefill(model[0](x))
    _, cache = model[0].prefill(x)
    model.zero_grad()

    assert context_parallelize(model) is model
    rows = slice(sum(lengths[: dist.get_rank()]), sum(lengths[: dist.get_rank() + 1]))
    mine = x[:, rows].clone().requires_grad_()
    my_y = model(mine)
    assert relative_error(my_y.detach(), y[:, rows]) <= 1e-12
    (my_y * grad_y[:, rows]).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        dist.all_reduce(parameter.grad)
        assert relative_error(parameter.grad, gradient) <= 1e-12
    x.requires_grad_()
    context_parallel_group, model[0].context_parallel_group = model[0].context_parallel_group, None
    model[1].context_parallel_group = model[2].context_parallel_group = None
    (model(x) * grad_y).sum().backward()
    assert relative_error(mine.grad, x.grad[:, rows]) <= 1e-12
    context_parallelize(model, context_parallel_group)

    with torch.no_grad():  # every rank can go on decoding
        hidden, my_cache = model[0].prefill(mine)
        _, my_state = model[1].prefill(hidden)
        assert torch.equal(my_cache, cache)
        assert all(relative_error(a, b.detach()) <= 1e-12 for a, b in zip(my_state, state, strict=True))
        model[1].step(model[0].step(x[:, 0].detach(), my_cache), my_state)
    with pytest.raises(ValueError, match="attention_mask: not supported under context parallelism"):
        model[1](mine, torch.ones(mine.shape[:2], dtype=torch.bool))
    with pytest.raises(ValueError, match="attention_mask: not supported under context parallelism"):
        model[0](mine, torch.ones(mine.shape[:2], dtype=torch.bool))


@pytest.mark.parametrize("layer_norm", ["token", None])
def test_layers(processes, layer_norm):
    for lengths in SHARDS[processes.ranks]:
        processes.run(_layers, lengths, layer_norm, 3)


def test_a_convolution_longer_than_a_shard(processes):
    """Rows from several ranks back."""
    lengths = {2: (5, 2), 4: (4, 1, 0, 3)}[processes.ranks]
    processes.run(_layers, lengths, "token", 5)
    processes.run(_layers, lengths, "token", 1)


@pytest.mark.skipif(EMULATED, reason="times mean nothing there")
def test_the_benchmark_leaves_its_figures(tmp_path):
    path = tmp_path / "figures.json"
    arguments = ["--seqlen", "256", "--rounds", "2", "--json", str(path)]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.context_parallel", *arguments], cwd=ROOT, check=True
    )
    figures = json.loads(path.read_text())
    assert figures["error"] <= 5e-6
    for name, method in figures["methods"].items():
        assert len(method["seconds"]) == 2
        assert method["median"] > 0
        assert (method["over_one_process"] is None) == ("processes" not in name or "layer" in name)
        assert (method["waited"] is None) == ("processes" not in name)
        assert method["waited"] is None or 0 < method["waited"] < method["median"] * 3  # three in a row
