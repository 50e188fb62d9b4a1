"""Inputs for the op and the measure of error, shared by the tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rebased_cuda import RebasedState, build_info, reference
from rebased_cuda.state import num_features

MAPS = ("outer", "square", "taylor", "elu")
NORMS = (None, "token", "head")
# the feature maps and feature dims of the tensor-core kernels
TENSOR_CORE_MAPS = [*((feature_map, 16) for feature_map in MAPS), ("outer", 8), ("outer", 32)]


@dataclass(frozen=True)
class Problem:
    """One call of the op; `inputs` makes the tensors, all of them leaves that require grad if wanted."""

    feature_map: str = "outer"
    layer_norm: str | None = "token"
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    seqlen: int = 21
    feature_dim: int = 5
    head_dim: int = 7
    affine: str = "heads"  # gamma, beta (heads, d); "shared": (d,); "mixed": some of each, one flat; "none"
    packed: tuple[int, ...] = ()  # cu_seqlens; then batch is 1
    with_state: bool = False
    normalize: bool = True
    eps: float = 1e-3
    scale: float | None = None
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    seed: int = 0

    def but(self, **changes: Any) -> Problem:
        return replace(self, **changes)

    @property
    def states(self) -> int:
        return len(self.packed) - 1 if self.packed else self.batch

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "feature_map": self.feature_map,
            "layer_norm": self.layer_norm,
            "scale": self.scale,
            "eps": self.eps,
            "normalize": self.normalize,
        }
        if self.packed:
            options["cu_seqlens"] = torch.tensor(self.packed, device=self.device)
        return options

    def inputs(self, requires_grad: bool = False) -> list[Tensor | None]:
        """q, k, v, gamma_q, beta_q, gamma_k, beta_k, initial kv, initial k."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(
            *sizes: int, dtype: torch.dtype = self.dtype, mean: float = 0.0, std: float = 1.0
        ) -> Tensor:
            x = mean + std * torch.randn(*sizes, generator=generator, dtype=torch.float64)
            return x.to(dtype).to(self.device).requires_grad_(requires_grad)

        b, n, d, dv = self.batch, self.seqlen, self.feature_dim, self.head_dim
        q, k = normal(b, self.heads, n, d), normal(b, self.kv_heads, n, d)
        v = normal(b, self.kv_heads, n, dv)
        parameters: list[Tensor | None] = [None] * 4
        if self.affine != "none":
            shapes = [(self.heads, d)] * 2 + [(self.kv_heads, d)] * 2
            if self.affine == "shared":
                shapes = [(d,)] * 4
            elif self.affine == "mixed":
                shapes[1:] = [(d,), (d,), (self.kv_heads * d,)]
            means = (1.0, 0.2, 1.0, 0.2)
            parameters = [
                normal(*shape, dtype=self.accumulator, mean=mean, std=0.3)
                for shape, mean in zip(shapes, means, strict=True)
            ]
        state: list[Tensor | None] = [None, None]
        if self.with_state:
            # of a real prefix: the denominator stays positive
            prefix = self.but(
                batch=self.states,
                seqlen=9,
                packed=(),
                with_state=False,
                dtype=torch.float64,
                seed=self.seed + 1,
            )
            kv, k_sum = run_reference(prefix.inputs(), prefix)[1:]
            state = [x.to(self.accumulator).detach().requires_grad_(requires_grad) for x in (kv, k_sum)]
        return [q, k, v, *parameters, *state]


def run(function: Any, inputs: list[Tensor | None], problem: Problem, **more: Any) -> tuple[Tensor, ...]:
    """(y, kv, k) of any form of the op."""
    *call, kv, k = inputs
    state = None if kv is None else RebasedState(kv, k)
    y, final = function(*call, initial_state=state, return_state=True, **problem.options(), **more)
    return y, *final


def run_reference(inputs: list[Tensor | None], problem: Problem, form: Any = reference.quadratic) -> Any:
    """The judge: the reference in float64."""
    return run(form, [None if x is None else x.double() for x in inputs], problem)


def laid_out(x: Tensor, how: str) -> Tensor:
    """The values of x in another layout; those that are expanded take the first one's values.

    Between padded rows lie NaNs, which nobody may read.
    """
    if x.numel() == 0 or how == "contiguous":
        return x
    if how == "padded rows":
        return torch.cat([x, torch.full_like(x[..., :1], torch.nan)], -1)[..., :-1]
    if how == "padded rows, aligned":
        padding = torch.full_like(x[..., :1], torch.nan).expand(*x.shape[:-1], 8 + -x.shape[-1] % 8)
        return torch.cat([x, padding], -1)[..., : x.shape[-1]]
    if how == "last strided":
        return torch.stack([x, -x], -1)[..., 0]
    if how == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if how == "token major":
        return x.transpose(-2, -3).contiguous().transpose(-2, -3) if x.dim() > 2 else x
    if how == "expanded batch":
        return x[:1].expand_as(x)
    if how == "expanded heads":
        return x[:, :1].expand_as(x)
    assert how == "columns first", how
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of the expected value."""
    if value.numel() == 0:
        assert value.shape == expected.shape
        return 0.0
    difference = (value.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-300)).item()


def rounds_operands(problem: Problem) -> bool:
    """Whether products round their operands to the dtype: tensor cores, and bfloat16 on some CPUs."""
    built = build_info()
    if problem.device == "cuda" or built["cpu_backend"] == "emulated":
        return True
    if problem.dtype != torch.bfloat16 or problem.feature_map not in ("outer", "taylor"):
        return False
    on_amx = built["cpu_instruction_set"] == "avx512_amx" and -(-problem.head_dim // 16) % 2 == 0
    return on_amx or built["cpu_instruction_set"] == "avx512_bf16"


def plain_low_precision(
    q: Tensor, k: Tensor, v: Tensor, *affine: Tensor | None, problem: Problem, chunk: int = 64
) -> Tensor:
    """Chunked PyTorch as one writes it for 16-bit tensor cores: operands rounded, sums and states float32."""

    def rounded(x: Tensor) -> Tensor:
        return x.to(problem.dtype).float()

    def prepared(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        x = reference.normalise(x.float(), gamma, beta, problem.layer_norm)
        return rounded(x)

    q, k, v = prepared(q, *affine[:2]), prepared(k, *affine[2:]), v.float()
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    state: Any = 0.0
    rows = []
    for q_c, k_c, v_c in zip(*(torch.split(x, chunk, 2) for x in (q, k, v)), strict=True):
        sim = rounded(reference.sim(q_c, k_c, problem.feature_map)).tril()
        sums = sim @ v_c
        if isinstance(state, torch.Tensor):
            sums = sums + rounded(reference.query_features(q_c, problem.feature_map)) @ rounded(state)
        state = state + rounded(reference.key_features(k_c, problem.feature_map)).mT @ v_c
        rows.append(sums[..., :-1] / (sums[..., -1:] + problem.eps))
    return torch.cat(rows, 2).to(problem.dtype)


def features_of(problem: Problem) -> int:
    return num_features(problem.feature_map, problem.feature_dim)


def paged(state: RebasedState, gap: int) -> tuple[RebasedState, Tensor]:
    """A copy of a pool as a serving engine's pages hold it, and the `gap` NaN at the end of each page.

    A page is a slot of kv, a slot of k and the gap, (slots, gap) of all pages together.
    """
    slots, kv_size, k_size = state.kv.shape[0], state.kv[0].numel(), state.k[0].numel()
    pages = state.kv.new_full((slots, kv_size + k_size + gap), float("nan"))
    kv = pages[:, :kv_size].unflatten(1, state.kv.shape[1:])
    k = pages[:, kv_size : kv_size + k_size].unflatten(1, state.k.shape[1:])
    kv.copy_(state.kv)
    k.copy_(state.k)
    return RebasedState(kv, k), pages[:, kv_size + k_size :]
