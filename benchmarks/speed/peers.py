"""The op and what one would otherwise run; `prepare` makes each ready for one shape.

All start from what a model's projections give, q and k (B, N, H*d) and v (B, N, H*dv), and count LayerNorm
over a token's features, gamma, beta, feature map, casts and the division; softmax attention starts from q, k
and v of head dim dv. Plain PyTorch is rebased_cuda.demo.baselines, chunked with the fastest of its chunk
lengths here; others.py has the packages. A method that does not run here raises UnavailableError with the
reason, which becomes its row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rebased_cuda import reference
from rebased_cuda.demo import baselines, timing

from . import others
from .harness import OURS, Prepared, Shape, UnavailableError, relative_error
from .op import attention, projections, runner, split_heads

Function = Callable[..., Tensor]

SDPA = "SDPA"
LOOP, CUMSUM, QUADRATIC = "PyTorch loop", "PyTorch cumsum", "PyTorch quadratic"
COMPILED = {f"{name}, compiled": name for name in (LOOP, CUMSUM, QUADRATIC)}
EAGER = (OURS, SDPA, LOOP, CUMSUM, QUADRATIC)
PLAIN = (LOOP, CUMSUM, QUADRATIC, *COMPILED)
CPU_METHODS = (*EAGER, *COMPILED, *others.NAMES)
GPU_METHODS = (OURS, "SDPA flash", "SDPA cuDNN", *PLAIN, *others.NAMES)

# relative L2 errors that mean "computes the same": this is no test of accuracy, python_tests has those
BOUNDS = {"float64": 1e-10, "float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
# tokens x heads that the float64 reference is run on; a shape with more is checked on some heads
CHECKED = 1 << 17
# What goes through N x N scores is left out where these are more; the second holds them in memory.
SOFTMAX_PAIRS = {"cpu": 2 << 30, "cuda": 1 << 40}
QUADRATIC_PAIRS = {"cpu": 1 << 26, "cuda": 1 << 30}


@functools.lru_cache(maxsize=2)
def softmax_inputs(shape: Shape, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    sizes = (shape.batch, shape.heads, shape.seqlen, shape.head_dim)
    made = (torch.randn(sizes, generator=generator, device=device) for _ in range(3))
    return tuple(x.to(shape.torch_dtype).requires_grad_() for x in made)


@functools.lru_cache(maxsize=2)
def _checked(shape: Shape) -> tuple[tuple[int, int], ...]:
    """The (batch, head) pairs that are checked: all, or the first and last ones."""
    pairs = [(b, h) for b in range(shape.batch) for h in range(shape.heads)]
    count = max(1, CHECKED // max(shape.seqlen, 1))
    return tuple(pairs if len(pairs) <= count else pairs[: count // 2] + pairs[-((count + 1) // 2) :])


def _pick(x: Tensor, shape: Shape) -> Tensor:
    """(pairs, 1, N, width) of x (B, H, N, width)."""
    return torch.stack([x[b, h] for b, h in _checked(shape)]).unsqueeze(1)


@functools.lru_cache(maxsize=2)
def expected(shape: Shape, device: str) -> Tensor:
    """y of the checked pairs in float64. LayerNorm runs over all heads before they are picked."""
    q, k, v, gamma_q, beta_q, gamma_k, beta_k = (x.detach().double() for x in projections(shape, device))
    q, k, v = (split_heads(x, shape.heads) for x in (q, k, v))
    q = _pick(reference.normalise(q, gamma_q, beta_q, "token"), shape)
    k = _pick(reference.normalise(k, gamma_k, beta_k, "token"), shape)
    y = reference.chunked(q, k, _pick(v, shape), feature_map=shape.feature_map, chunk=256)
    assert isinstance(y, Tensor)
    return y


@functools.lru_cache(maxsize=2)
def expected_softmax(shape: Shape, device: str) -> Tensor:
    """Softmax attention in float64, on a sequence's first and last 64 rows of the checked pairs."""
    q, k, v = (_pick(x.detach(), shape).double() for x in softmax_inputs(shape, device))
    return torch.cat([_softmax_rows(q, k, v, rows) for rows in _softmax_checked(shape)], 2)


def _softmax_checked(shape: Shape) -> tuple[range, ...]:
    edge = min(64, shape.seqlen)
    return range(edge), range(max(shape.seqlen - 64, edge), shape.seqlen)


def _softmax_rows(q: Tensor, k: Tensor, v: Tensor, rows: range) -> Tensor:
    score = q[:, :, rows.start : rows.stop] @ k.mT * q.shape[-1] ** -0.5
    position = torch.arange(k.shape[2], device=k.device)
    query = torch.arange(rows.start, rows.stop, device=k.device)
    return score.masked_fill(position > query[:, None], -torch.inf).softmax(-1) @ v


def prepare(name: str, shape: Shape, direction: str, device: str, build: bool = True) -> Prepared:
    """Raises UnavailableError where the method does not run here. `build`: others.py."""
    if name.startswith(SDPA):
        function = _softmax(name, shape, device)
        tensors = softmax_inputs(shape, device)
    else:
        function = _linear(name, shape, direction, device, build)
        tensors = projections(shape, device)

    def error() -> float:
        with torch.set_grad_enabled(
            direction != "forward"
        ):  # as it is timed: a compiler makes one graph of each
            y = _pick(function(*tensors).detach(), shape)
        if not name.startswith(SDPA):
            return relative_error(y, expected(shape, device))
        first, last = _softmax_checked(shape)
        edges = torch.cat([y[:, :, rows.start : rows.stop] for rows in (first, last)], 2)
        return relative_error(edges, expected_softmax(shape, device))

    run = runner(function, tensors, shape, direction, device)
    compiles = (
        name in COMPILED or device == "cuda"
    )  # where libraries choose, and Triton compiles, at first use
    return Prepared(run, error, BOUNDS[shape.dtype], compiles)


def _refuse_pairs(shape: Shape, most: int) -> None:
    pairs = shape.batch * shape.heads * shape.seqlen**2
    if pairs > most:
        raise UnavailableError(f"left out: {pairs / 1e9:.3g}e9 scores take too long, shorter shapes have it")


def _softmax(name: str, shape: Shape, device: str) -> Function:
    _refuse_pairs(shape, SOFTMAX_PAIRS[device])
    backend = {"SDPA flash": "FLASH_ATTENTION", "SDPA cuDNN": "CUDNN_ATTENTION"}.get(name)
    if backend is None:
        return baselines.softmax_attention
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def chosen(*qkv: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return baselines.softmax_attention(*qkv)

    return chosen


def _linear(name: str, shape: Shape, direction: str, device: str, build: bool) -> Function:
    if name == OURS:
        return functools.partial(attention, heads=shape.heads, feature_map=shape.feature_map)
    if name in others.NAMES:
        return others.function(name, shape, device, build)
    if shape.feature_map not in ("outer", "square"):
        raise UnavailableError("not written for this feature map")
    plain = COMPILED.get(name, name)
    if plain == QUADRATIC:
        _refuse_pairs(shape, QUADRATIC_PAIRS[device])
        function: Function = functools.partial(baselines.quadratic, feature_map=shape.feature_map)
        return _compile(function) if name in COMPILED else function
    chunk = _fastest_chunk(plain, shape, direction, device)
    if name == plain:
        return functools.partial(_CHUNKED[plain], feature_map=shape.feature_map, chunk=chunk)
    if plain == CUMSUM:
        return _compile(
            functools.partial(baselines.chunked_cumsum, feature_map=shape.feature_map, chunk=chunk)
        )
    body = _compile(baselines.one_chunk)  # the body of the loop: a compiler would unroll the whole

    def step(
        feature_map: str, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The first chunk, which has no state to read, would be one graph more."""
        return (baselines.one_chunk if state is None else body)(feature_map, q, k, v, state)

    return functools.partial(
        baselines.chunked_loop, feature_map=shape.feature_map, chunk=chunk, chunk_step=step
    )


def _compile(function: Function) -> Function:
    return torch.compile(function, dynamic=False)


def forget_compiled() -> None:
    """To be called between comparisons: past some number of graphs the compiler leaves a function eager."""
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # a row that says so


_CHUNKED: dict[str, Function] = {LOOP: baselines.chunked_loop, CUMSUM: baselines.chunked_cumsum}


@functools.lru_cache(maxsize=16)
def _fastest_chunk(name: str, shape: Shape, direction: str, device: str) -> int:
    def seconds(chunk: int) -> float:
        function = functools.partial(_CHUNKED[name], feature_map=shape.feature_map, chunk=chunk)
        run = runner(function, projections(shape, device), shape, direction, device)
        return min(timing.once(run, device) for _ in range(2))

    allowed = [chunk for chunk in baselines.CHUNKS if chunk <= max(shape.seqlen, baselines.CHUNKS[0])]
    return min(allowed, key=seconds)
