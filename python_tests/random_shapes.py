"""Random calls of the op, and calls aimed at one launch configuration, each held to the float64 reference.

One draw repeats itself: `python python_tests/random_shapes.py 123` is draw 123 on this machine's devices, and
with the text of a launch configuration in place of the number the draw that is aimed at it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from problems import NORMS, Problem, laid_out, paged, rounds_operands
from torch import Tensor

from rebased_cuda import (
    RebasedState,
    build_info,
    rebased_attention,
    rebased_attention_step,
    reference,
    testing,
)
from rebased_cuda.state import num_features

MAPS = ("outer", "square", "taylor", "elu", "identity")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHARED_MEMORY = (227, 163, 99)  # KB a block may have: sm_90, sm_80, and sm_86, sm_89, sm_120
EMULATED = build_info()["cpu_backend"] == "emulated"
# What rounding a result to the dtype may cost, half the distance of two neighbours: no error is asked to be
# less, as a plain result of one or two numbers may be right by chance.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
Results = tuple[list[Tensor], list[Tensor]]  # y and states, gradients
FORCED_MISFIT = "no chunk length fits"


@dataclass(frozen=True)
class Draw:
    """A Problem, and what a caller can do with it that its sizes do not say."""

    name: str  # the argument that repeats it
    problem: Problem
    absent: tuple[int, ...] = ()  # which of gamma_q, beta_q, gamma_k, beta_k are left out
    layer_norm_eps: float = 1e-5
    return_state: bool = True
    loss: str = "both"  # what gradients come from: "y", "state", "both", or "none" where there is no backward
    state_gradient: bool = True  # whether the initial state requires grad
    layouts: tuple[str, str, str] = ("contiguous",) * 3  # of q, k, v
    gradient_layout: str = "contiguous"
    parameter_layout: str = "contiguous"
    index_dtype: torch.dtype = torch.int64
    limits: dict[str, int] = field(default_factory=dict)  # of the device
    forced: dict[str, Any] = field(default_factory=dict)  # of the plan's own choices
    steps: int = 3

    def options(self) -> dict[str, Any]:
        options = self.problem.options() | {"layer_norm_eps": self.layer_norm_eps}
        if self.problem.packed:
            options["cu_seqlens"] = options["cu_seqlens"].to(self.index_dtype)
        return options

    def inputs(self) -> list[Tensor | None]:
        """Leaves that require grad, in their layouts."""
        values = _values(self.problem, self.absent)
        laid = [laid_out(x, how) for x, how in zip(values[:3], self.layouts, strict=True)]
        laid += [None if x is None else laid_out(x, self.parameter_layout) for x in values[3:7]]
        leaves = [None if x is None else x.detach().requires_grad_() for x in (*laid, *values[7:])]
        if not self.state_gradient:
            leaves[7:] = [None if x is None else x.detach() for x in leaves[7:]]
        return leaves


@dataclass
class Outcome:
    """What a draw did: the launches that were planned, and its errors over those of plain PyTorch."""

    launches: set[str]
    ratios: list[float]
    failures: list[str]


# ---- drawing ----


def draw(seed: int, device: str = "cpu") -> Draw:
    """Draw number `seed`, the same on every machine; its dtype is DTYPES[seed % 4]."""
    rng = random.Random(seed)
    dtype = DTYPES[seed % len(DTYPES)]
    feature_map, layer_norm = rng.choice(MAPS), rng.choice(NORMS)
    feature_dim, head_dim = _size(rng, 128), _size(rng, 256)
    if rng.random() < 0.25:  # a kernel for these sizes alone
        feature_dim, head_dim = rng.choice([8, 16, 16, 32]), rng.choice([4, 16]) * rng.randint(1, 16)
    kv_heads, group = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 1, 2, 3, 4, 5, 16, 17, 19])
    batch = rng.choice([0, 1, 1, 1, 2, 3]) if rng.random() < 0.3 else rng.choice([1, 2])
    seqlen = _length(rng)
    with_state, return_state = rng.random() < 0.4, rng.random() < 0.5
    if rng.random() < 0.2:  # chunks of 64 rows, all full, of blocks whose threads are no multiple of 64
        feature_dim, head_dim, seqlen = rng.randint(8, 64), rng.randint(33, 56), rng.randint(64, 150)
        batch, with_state, return_state = 1, rng.random() < 0.1, rng.random() < 0.1

    sequences = rng.choice([1, 2, 3, 4, 7, 20]) if rng.random() < 0.35 else 0
    batch = 1 if sequences else batch

    # little enough work for thousands of draws: fewer heads and sequences first, then fewer rows
    most = rng.choice([2e6, 4e6, 2e7])
    work = num_features(feature_map, feature_dim) * head_dim + 64 * (feature_dim + head_dim)
    if (batch * group * seqlen + sequences) * kv_heads * work > most:
        batch, sequences = min(batch, 1), min(sequences, 3)
    if (group * seqlen + sequences) * kv_heads * work > most:
        kv_heads, group = 1, rng.choice([1, 2])
    if (group * seqlen + sequences) * work > most:
        sequences = min(sequences, 1)
        seqlen = min(seqlen, max(int(most / (group * work)), rng.choice([1, 5, 9, 17])))

    packed: tuple[int, ...] = ()
    if sequences:
        cuts = (rng.choice([0, seqlen, rng.randint(0, seqlen)]) for _ in range(sequences + 1))
        packed = tuple(sorted(cuts))
    epsilons = (1e-2, 0.5) if dtype in ROUNDING else (1e-6, 1e-3, 1e-2, 0.5)
    if dtype == torch.float32 and feature_map in ("outer", "square"):
        epsilons = (0.1, 0.5)  # one tiny denominator would make one row's luck all of a draw's error
    if feature_dim == 1:  # y depends on q through eps alone: of a small one rounding leaves little
        epsilons = (0.1, 0.5)
    problem = Problem(
        feature_map,
        layer_norm if feature_map != "identity" else None,
        batch,
        kv_heads * group,
        kv_heads,
        seqlen,
        feature_dim,
        head_dim,
        affine=rng.choice(["heads", "shared", "mixed", "none"]),
        packed=packed,
        with_state=with_state,
        normalize=rng.random() < 0.85,
        eps=rng.choice(epsilons),
        scale=rng.choice([None, None, 0.7, -0.3, 1.5 * feature_dim**-0.5]),
        dtype=dtype,
        device=device,
        seed=seed,
    )
    limits = {"shared_memory_per_block": rng.choice(SHARED_MEMORY) << 10}
    limits["multiprocessors"] = rng.choice([1, 2, 132])
    forced = {}
    if rng.random() < 0.2:
        forced["segments"] = rng.choice([1, 2, 3, 5, 9, 12])
    if rng.random() < 0.2:
        forced["chunk"] = rng.choice([4, 8, 16, 32, 64])
    if rng.random() < 0.2:
        forced["state_in_shared"] = rng.choice([0, 1])
    layouts = [rng.choice(LAYOUTS) if rng.random() < 0.5 else "contiguous" for _ in range(4)]
    if feature_dim == 1:  # LayerNorm of heads that are all one number is rounding alone
        layouts = ["contiguous" if how == "expanded heads" else how for how in layouts]
    one = Draw(
        str(seed),
        problem,
        tuple(i for i in range(4) if rng.random() < 0.15),
        # LayerNorm of two numbers is little but a sign, and its gradient rounding alone
        layer_norm_eps=rng.choice([1e-5, 1e-5, 1e-2]) if feature_dim > 2 else 0.1,
        return_state=return_state,
        loss=rng.choice(["y", "both", "both", "state"]) if return_state else "y",
        state_gradient=rng.random() < 0.8,
        layouts=tuple(layouts[:3]),
        gradient_layout=layouts[3],
        parameter_layout=rng.choice(["contiguous", "contiguous", "offset", "last strided"]),
        index_dtype=rng.choice([torch.int32, torch.int64]),
        limits=limits,
        forced=forced,
        steps=rng.choice([1, 2, 4]),
    )
    if rng.random() < 0.3:
        forced["compensated_rows"] = 1  # segments of more than a chunk then have carries
    return one


def _size(rng: random.Random, most: int) -> int:
    """Large ones as often as small ones."""
    return rng.randint(1, most) if rng.random() < 0.5 else round(most ** rng.random())


def _length(rng: random.Random) -> int:
    """Few rows, or about as many as some chunks have."""
    if rng.random() < 0.3:
        return rng.choice([0, 1, 2, 3, 5, 7])
    chunk = rng.choice([4, 8, 16, 32, 64, 128])
    return chunk * rng.randint(1, 3) + rng.choice([-1, 0, 1])


LONG = 5_000_000  # operations


def _shortened(text: str, example: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """An example with fewer rows and features, and what the plan is forced to so that it still takes `text`.

    By itself the plan cuts many segments, and compensates sums, only where there are thousands of rows. A few
    chunks a segment run the same code: the sum of the first two leaves a carry, which the third gives back
    and the fourth looks at; of many segments most begin with a sum, so that three will do. Where chunk and
    place of the state are forced too, neither follows from the number of features any more.
    """
    path, words = text.split()[1], text.split()[2:]
    many, few, compensated = (word in words for word in ("many-segments", "few-segments", "compensated"))
    if not compensated and (example["work"] <= LONG or not (many or few)):
        return example, {}
    segments = 9 if many else 3 if few else 1
    chunks = (2 if not compensated else 3 if many else 4) * segments - (segments > 1)
    forced = {"path": path, "segments": segments, "compensated_rows": int(compensated)}
    lengths = (int(word[len("chunk=") :]) for word in words if word.startswith("chunk="))
    feature_dim, chunk = example["feature_dim"], next(lengths, 64)  # the most that float32's kernels have
    if path == "general":
        forced |= {"chunk": chunk, "state_in_shared": int("state-in-shared" in words)}
        while feature_dim > 5 and chunks * chunk * _row_work(example | {"feature_dim": feature_dim}) > LONG:
            feature_dim -= 1
    return example | {"feature_dim": feature_dim, "seqlen": chunks * chunk - 2}, forced


def _row_work(example: dict[str, Any]) -> int:
    """As work_of in csrc/cuda/plan/configurations.cpp counts it."""
    feature_dim, head_dim = example["feature_dim"], example["head_dim"]
    state = max(num_features(example["feature_map"], feature_dim) * head_dim, 256)
    return example["heads"] * (state + 64 * (feature_dim + head_dim))


def aimed(text: str, example: dict[str, Any], device: str = "cpu") -> Draw:
    """A draw that takes the launch configuration `text`; `example` is the call that was found for it."""
    rng = random.Random(text)
    example, forced = _shortened(text, example)
    dtype, seqlen = getattr(torch, example["dtype"]), example["seqlen"]
    feature_map, state = example["feature_map"], example["state"]
    loss = "none" if text.startswith("forward") else "both" if state else "y"
    problem = Problem(
        feature_map,
        rng.choice(NORMS) if feature_map != "identity" else None,
        1,
        example["heads"],
        example["kv_heads"],
        seqlen,
        example["feature_dim"],
        example["head_dim"],
        affine=rng.choice(["heads", "shared", "mixed", "none"]),
        packed=(1, seqlen) if example["sequences"] else (),  # one sequence, and a row before it
        with_state=state,
        eps=1e-2 if dtype == torch.float64 else 0.5,
        dtype=dtype,
        device=device,
        seed=rng.randint(0, 1 << 30),
    )
    return Draw(
        text,
        problem,
        return_state=state,
        loss=loss,
        layouts=("contiguous" if example["aligned"] else "offset", "contiguous", "contiguous"),
        limits={name: example[name] for name in ("multiprocessors", "shared_memory_per_block")},
        forced=forced,
        steps=3 if text.startswith("step") else 0,
    )


# ---- values and layouts ----


def _values(problem: Problem, absent: tuple[int, ...]) -> list[Tensor | None]:
    """Problem.inputs without the parameters that are absent; for `identity` positive, as its features are."""
    *values, _, _ = problem.but(with_state=False).inputs()
    for i in absent:
        values[3 + i] = None
    if problem.feature_map == "identity":
        values = [None if x is None else x.abs() + 0.1 for x in values]
    state: list[Tensor | None] = [None, None]
    if problem.with_state:  # of a real prefix: the denominator stays positive
        prefix = problem.but(
            batch=problem.states, seqlen=9, packed=(), with_state=False, dtype=torch.float64
        ).but(seed=problem.seed + 1, affine="none")
        rows = _values(prefix, absent)[:3]
        _, (kv, k) = reference.quadratic(*rows, return_state=True, **prefix.options())
        state = [x.to(problem.accumulator) for x in (kv, k)]
    return [*values, *state]


LAYOUTS = (
    "padded rows",
    "padded rows, aligned",
    "last strided",
    "offset",
    "token major",
    "token major",
    "expanded batch",
    "expanded heads",
    "columns first",
)


# ---- running ----


@contextlib.contextmanager
def _planned(draw: Draw, forced: bool) -> Iterator[None]:
    """The plan sees the draw's device; the emulator refuses what that device would refuse."""
    variable, before = "REBASED_EMULATOR_SHARED_MEMORY", os.environ.get("REBASED_EMULATOR_SHARED_MEMORY")
    limits = {} if draw.problem.device == "cuda" and not _card_has(draw.limits) else draw.limits
    testing.set_plan_override(**limits, **(draw.forced if forced else {}))
    if limits:
        os.environ[variable] = str(limits["shared_memory_per_block"] >> 10)
    testing.record_launches(True)
    try:
        yield
    finally:
        testing.set_plan_override()
        testing.record_launches(False)
        if before is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before


def _card_has(limits: dict[str, int]) -> bool:
    wanted = limits.get("shared_memory_per_block", 0)
    return wanted <= torch.cuda.get_device_properties(0).shared_memory_per_block_optin


def _outputs(function: Any, draw: Draw, inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
    """y, and with return_state kv and k."""
    *call, kv, k = inputs
    state = None if kv is None else RebasedState(kv, k)
    result = function(*call, initial_state=state, return_state=draw.return_state, **draw.options())
    return (result[0], *result[1]) if draw.return_state else (result,)


def _everything(function: Any, draw: Draw, inputs: list[Tensor | None]) -> Results:
    """Outputs, and the gradient of every input that has one."""
    outputs = _outputs(function, draw, inputs)
    if draw.loss == "none":
        return [x.detach() for x in outputs], []
    used = outputs[:1] if draw.loss == "y" else outputs[1:] if draw.loss == "state" else outputs
    generator = torch.Generator().manual_seed(draw.problem.seed + 2)
    upstream = []
    for output in used:
        gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        gradient = gradient.to(draw.problem.dtype if output is outputs[0] else draw.problem.accumulator)
        upstream.append(laid_out(gradient.to(output.device), draw.gradient_layout).to(output.dtype))
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    gradients = torch.autograd.grad(used, leaves, upstream, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in outputs], list(gradients)


class _Division(torch.autograd.Function):
    """y of a sum of values and one of weights, which backward reads as it was returned: in the dtype of y.

    Every fused attention keeps y that way. Where a row has seen little but its own value, the gradients of q
    and k are what is left of grad y . (v - y), and y's rounding is most of their error.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sums: Tensor,
        denominator: Tensor,
        dtype: torch.dtype,
        operands: torch.dtype | None,
        in_order: bool,
    ) -> Tensor:
        y = (sums / denominator).to(dtype)
        ctx.save_for_backward(y, denominator)
        ctx.operands, ctx.in_order = operands, in_order
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        y, denominator = ctx.saved_tensors
        gradient = gradient.to(denominator.dtype) / denominator
        products = gradient * y
        of_denominator = -products.sum(-1, keepdim=True)
        if ctx.in_order:  # as a thread sums them; PyTorch sums many parts side by side
            of_denominator = torch.zeros_like(denominator)
            for column in products.split(1, -1):
                of_denominator = of_denominator - column
        if ctx.operands is not None:  # an operand of the product with v
            gradient = gradient.to(ctx.operands).float()
        return gradient, of_denominator, None, None, None


def _plain_results(
    draw: Draw, launches: set[str], inputs: list[Tensor | None], exact: Results
) -> Iterator[tuple[Results, Results]]:
    """What one would write in PyTorch for this dtype, beside exact results: its errors are the condition.

    Sums are float32 (float64 for float64), operands rounded where the op's are, y kept in the dtype. Few
    numbers may be right by chance in one form, so there are several; then what becomes of the exact results
    where every input is off by a rounding of the sums' type; and for 16-bit types, whose roundings are few
    and large where rows are few, other inputs of the same sizes.
    """
    problem = draw.problem
    on_kernels = EMULATED or problem.device == "cuda"
    rounds = any("tensor_core" in x for x in launches) if on_kernels else rounds_operands(problem)
    operands = problem.dtype if rounds and problem.dtype in ROUNDING else None
    for chunk, gradients, in_order in (
        (64, None, False),
        (64, operands, True),
        (16, operands, False),
        (5, operands, False),
        (1000, operands, False),
    ):
        form = functools.partial(
            _plain, chunk=chunk, operands=operands, gradients=gradients, in_order=in_order
        )
        yield _everything(form, draw, inputs), exact
    yield _everything(reference.chunked, draw, inputs), exact
    for seed in range(3):
        yield _everything(_exact(problem), draw, _near(inputs, problem, seed)), exact
    for seed in range(4 if problem.dtype in ROUNDING else 0):
        other = replace(draw, problem=problem.but(seed=problem.seed + 10 + seed))
        leaves = other.inputs()
        form = functools.partial(_plain, chunk=64, operands=operands, gradients=operands, in_order=True)
        yield _everything(form, other, leaves), _everything(_exact(problem), other, _wide(leaves))


def _near(inputs: list[Tensor | None], problem: Problem, seed: int) -> list[Tensor | None]:
    """The inputs in float64, each number off by a rounding of the type that sums have."""
    generator = torch.Generator().manual_seed(problem.seed + 3 + seed)
    unit = torch.finfo(problem.accumulator).eps / 2

    def moved(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        return (x.detach().double() * (1 + unit * noise)).requires_grad_(x.requires_grad)

    return [None if x is None else moved(x) for x in inputs]


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *affine: Tensor | None,
    chunk: int,
    operands: torch.dtype | None,
    gradients: torch.dtype | None,
    in_order: bool = False,
    initial_state: Any,
    return_state: bool,
    normalize: bool,
    eps: float,
    **options: Any,
) -> Any:
    def rounded(x: Tensor) -> Tensor:
        return x if operands is None else x.to(operands).float()

    def form(
        q: Tensor, k: Tensor, v: Tensor, state: Tensor, feature_map: str, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        q, k = rounded(q), rounded(k)
        sums = []
        for q_c, k_c, v_c in zip(*(torch.split(x, chunk, -2) for x in (q, k, v)), strict=True):
            scores = rounded(reference._sim(q_c, k_c, feature_map, scale)).tril()
            features = rounded(reference._query_features(q_c, feature_map, scale))
            sums.append(scores @ v_c + features @ rounded(state))
            state = state + rounded(reference._key_features(k_c, feature_map)).mT @ v_c
        return torch.cat(sums, -2), state

    dtype = q.dtype
    q, k, v = (x if dtype == torch.float64 else x.float() for x in (q, k, v))
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # whose sum is the denominator
    if initial_state is not None:
        kv, k_sums = initial_state
        initial_state = (torch.cat([kv, k_sums.unsqueeze(-1)], -1), k_sums)
    sums, (kv, k_sums) = reference._attend(
        form, q, k, v, *affine, initial_state=initial_state, return_state=True, normalize=False, **options
    )
    y = sums[..., :-1].to(dtype)
    if normalize:
        y = _Division.apply(sums[..., :-1], sums[..., -1:] + eps, dtype, gradients, in_order)
    return (y, (kv[..., :-1], k_sums)) if return_state else y


def _exact(problem: Problem) -> Any:
    return functools.partial(reference.chunked, chunk=max(min(problem.seqlen, 192), 1))


def _wide(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in inputs]


# ---- judging ----


def _rms(x: Tensor) -> float:
    return x.double().norm().item() / max(x.numel(), 1) ** 0.5


def _errors(values: list[Tensor], exact: list[Tensor], weights: list[float]) -> list[float]:
    """Relative L2 errors; what is smaller than its weight, a root mean square, is measured against that.

    Such gradients are differences of large numbers: LayerNorm of a single number has none but rounding.
    """
    errors = []
    for value, expected, least in zip(values, exact, weights, strict=True):
        assert value.shape == expected.shape
        scale = max(expected.norm().item(), least * expected.numel() ** 0.5, 1e-300)
        errors.append((value.double() - expected).norm().item() / scale)
    return errors


def check(draw: Draw) -> Outcome:
    """Runs a draw and compares all that it gives with the float64 reference, the decode step too."""
    problem = draw.problem
    outcome = Outcome(set(), [], [])
    inputs = draw.inputs()
    try:
        with _planned(draw, forced=True):
            got = _everything(rebased_attention, draw, inputs)
            outcome.launches = set(testing.take_recorded_launches())
    except RuntimeError as error:
        if not draw.forced or FORCED_MISFIT not in str(error):
            raise
        with _planned(draw, forced=False):
            got = _everything(rebased_attention, draw, inputs)
            outcome.launches = set(testing.take_recorded_launches())
    exact = _everything(_exact(problem), draw, _wide(inputs))
    plain = _plain_results(draw, outcome.launches, inputs, exact)

    given = [name for name, x in zip(INPUTS, inputs, strict=True) if x is not None and x.requires_grad]
    given = [] if draw.loss == "none" else given
    names = [*("y", "kv", "k")[: len(got[0])], *(f"grad {x}" for x in given)]
    _judge(outcome, problem, names, got, exact, plain)
    if problem.packed:
        y, first, last = got[0][0], problem.packed[0], problem.packed[-1]
        if y[:, :, :first].any() or y[:, :, last:].any():
            outcome.failures.append("y: rows of no sequence are not zero")
    if draw.steps:
        _check_steps(draw, outcome)
    return outcome


COMPARED = ("y", "grad q", "grad k", "grad v")
INPUTS = ("q", "k", "v", "gamma_q", "beta_q", "gamma_k", "beta_k", "kv", "k sums")


def _spread(x: Tensor) -> float:
    """By how much one error of so few numbers can be more than another that is as large on average."""
    return 1 + 2 / max(x.numel(), 1) ** 0.5 if x.numel() < 64 else 1.0


def _judge(
    outcome: Outcome,
    problem: Problem,
    names: list[str],
    got: Results,
    exact: Results,
    plain: Iterator[tuple[Results, Results]],
) -> None:
    """The tolerances: a bound of the dtype, or what the problem's condition makes of it."""
    if problem.dtype in ROUNDING:
        factor, of_y, of_gradients = 3, ROUNDING[problem.dtype], ROUNDING[problem.dtype]
    elif problem.dtype == torch.float32:
        factor, of_y, of_gradients = 2, 5e-6, 2e-5
    else:
        factor, of_y, of_gradients = 20, 1e-11, 1e-11
    of_states = 1e-11 if problem.dtype == torch.float64 else 5e-6
    bounds = [of_y, *(of_states for _ in got[0][1:]), *(of_gradients for _ in got[1])]
    values, expected = [*got[0], *got[1]], [*exact[0], *exact[1]]
    # of a number so much less than the largest, float32's rounding of that one is the bound
    weight = 1e-2 if problem.dtype == torch.float32 else 1e-3
    least = weight * max((_rms(x) for x in exact[1]), default=0.0)
    weights = [*(0.0 for _ in exact[0]), *(least for _ in exact[1])]
    errors = _errors(values, expected, weights)
    conditions = [0.0] * len(errors)
    for index, (results, of_these) in enumerate(plain):
        others = _errors([*results[0], *results[1]], [*of_these[0], *of_these[1]], weights)
        conditions = [max(pair) for pair in zip(conditions, others, strict=True)]
        if index == 0:
            for name, x, error, other, weight in zip(names, expected, errors, others, weights, strict=True):
                if name in COMPARED and problem.dtype in ROUNDING and x.numel() >= 64 and _rms(x) > weight:
                    outcome.ratios.append(error / max(other, 1e-300))
        wrong = [
            f"{name}: error {error:.2e}, of plain PyTorch {condition:.2e}"
            for name, x, error, bound, condition in zip(
                names, expected, errors, bounds, conditions, strict=True
            )
            if not error <= max(bound, factor * _spread(x) * condition)
        ]
        if not wrong:
            return
    outcome.failures += wrong


def _check_steps(draw: Draw, outcome: Outcome) -> None:
    """A few tokens one by one, from the draw's state, in slots of a pool larger than the batch."""
    problem = draw.problem.but(packed=(), seqlen=draw.steps, batch=min(draw.problem.states, 3))
    values = [None if x is None else x.detach() for x in _values(problem, draw.absent)]
    q, k, v, *parameters, kv, k_sum = values
    rng = random.Random(problem.seed)
    slots = torch.tensor(rng.sample(range(problem.batch + 2), problem.batch), dtype=torch.int64)
    slots = slots.to(problem.device)
    pool = RebasedState.zeros(
        problem.batch + 2,
        problem.kv_heads,
        problem.feature_dim,
        problem.head_dim,
        feature_map=problem.feature_map,
        dtype=problem.accumulator,
        device=problem.device,
    )
    between = None
    if rng.random() < 0.5:
        pool, between = paged(pool, rng.choice([1, 4, 7]))
    if kv is not None:
        pool.kv[slots], pool.k[slots] = kv, k_sum
    options = problem.options() | {"layer_norm_eps": draw.layer_norm_eps}
    rows = []
    with _planned(draw, forced=False), torch.no_grad():
        for i in range(problem.seqlen):
            row = [x[:, :, i] for x in (q, k, v)]
            rows.append(rebased_attention_step(*row, pool, *parameters, state_index=slots, **options))
        outcome.launches |= set(testing.take_recorded_launches())
    got = [torch.stack(rows, 2), pool.kv[slots], pool.k[slots]]

    def recurrent(inputs: list[Tensor | None]) -> list[Tensor]:
        *call, kv, k_sum = inputs
        state = None if kv is None else (kv, k_sum)
        y, final = reference.recurrent(*call, initial_state=state, return_state=True, **options)
        return [y, *final]

    exact = recurrent([None if x is None else x.double() for x in values])

    def plain() -> Iterator[tuple[Results, Results]]:
        yield (recurrent(values), []), (exact, [])
        for seed in range(3):
            yield (recurrent(_near(values, problem, seed)), []), (exact, [])

    unused = [i for i in range(problem.batch + 2) if i not in slots.tolist()]
    if pool.kv[unused].any() or pool.k[unused].any():
        outcome.failures.append("step: a slot that was not named has changed")
    if between is not None and not between.isnan().all():
        outcome.failures.append("step: something between the slots has changed")
    _judge(outcome, problem, ["step y", "step kv", "step k"], (got, []), (exact, []), plain())


def describe(draw: Draw, failures: list[str]) -> str:
    """One line that repeats a draw, and what was wrong with it."""
    backend = "REBASED_CPU_BACKEND=emulated " if EMULATED and draw.problem.device == "cpu" else ""
    command = f"{backend}python python_tests/random_shapes.py {draw.name!r} {draw.problem.device}"
    return f"{command}\n    {'; '.join(failures)}\n    {draw}"


def examples() -> dict[str, dict[str, Any]]:
    """Every launch configuration that the plan can choose, with the smallest call that was found for it."""
    found: dict[str, dict[str, Any]] = {}
    for kilobytes in SHARED_MEMORY:
        for text, example in testing.reachable_configurations(kilobytes << 10):
            rank = example["says_little"], example["work"]
            if text not in found or rank < (found[text]["says_little"], found[text]["work"]):
                found[text] = example
    return found


if __name__ == "__main__":
    name, device = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "cpu"
    repeated = draw(int(name), device) if name.isdigit() else aimed(name, examples()[name], device)
    result = check(repeated)
    print(describe(repeated, result.failures), *sorted(result.launches), sep="\n")
