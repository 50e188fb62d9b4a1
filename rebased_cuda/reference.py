"""What `rebased_attention` computes, in readable PyTorch: the judge of every other implementation.

    q' = gamma_q * LayerNorm(q) + beta_q          k' = gamma_k * LayerNorm(k) + beta_k         (1)
    sim(i, j) = phi(q'_i) . phi(k'_j)                                                          (2)
    y_i = sum_{j<=i} sim(i, j) v_j / (sum_{j<=i} sim(i, j) + eps)                              (3)

As sim is a dot product of features, the sums of (3) over a prefix are a state of fixed size:

    kv_i = sum_{j<=i} phi(k'_j) v_j^T             k_i = sum_{j<=i} phi(k'_j)                   (4)
    y_i = phi(q'_i) kv_i / (phi(q'_i) k_i + eps)                                               (5)

Three forms of one function, alike in arguments and results:

    quadratic   (3) as it stands, with the N x N matrix of sim
    chunked     (3) within a chunk of tokens, (4) and (5) from one chunk to the next
    recurrent   (4) and (5), token by token; `step` is one such token

    form(q, k, v, gamma_q=None, beta_q=None, gamma_k=None, beta_k=None, *, feature_map="outer",
         layer_norm=None, scale=None, eps=1e-6, layer_norm_eps=1e-5, normalize=True,
         initial_state=None, return_state=False, cu_seqlens=None) -> y  or  y, (kv, k)

    q (B, Hq, N, d)   k (B, Hkv, N, d)   v (B, Hkv, N, dv)   y (B, Hq, N, dv)
    gamma, beta (d,), (heads, d) or (heads * d,)   kv (B, Hkv, F, dv)   k (B, Hkv, F)

Query head h reads the kv head h // (Hq // Hkv). `cu_seqlens` packs sequences along N with B = 1:
the states' first dimension is then the number of sequences, and y = 0 for rows in no sequence.
Everything inside, states included, is float32, or float64 for float64 inputs; y has q's dtype.
Nothing is updated in place, so autograd gives the gradients, also those through the states.

Every public function here raises a ValueError or a TypeError that names the argument which is wrong, as
`rebased_attention` does. Devices and widths may be any. The values of cu_seqlens are checked on any device.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._checks import (
    check_bool,
    check_bounds,
    check_index,
    check_number,
    check_options,
    check_parameter,
    check_qkv,
    check_state,
    fail,
)
from .state import check_layout, check_memory, check_size

State = tuple[Tensor, Tensor]  # kv (B, Hkv, F, dv), k (B, Hkv, F)
Result = Tensor | tuple[Tensor, State]

FEATURE_MAPS = ("outer", "square", "taylor", "elu", "identity")
LAYER_NORMS = ("token", "head", None)


def normalise(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    layer_norm: str | None = None,
    layer_norm_eps: float = 1e-5,
) -> Tensor:
    """Equation (1): x' = gamma * LayerNorm(x) + beta, for x (B, heads, N, d).

    "token" takes mean and variance over all heads' features of a token together, "head" over each
    head's own; None leaves the LayerNorm out, gamma and beta stay. Both are (d,), (heads, d) or
    (heads * d,).
    """
    _check_rows("x", x, 3)
    if x.dim() != 4:
        raise fail("x", "shape (B, heads, N, d)", f"shape {tuple(x.shape)}")
    _check_name("layer_norm", layer_norm, LAYER_NORMS)
    check_number("layer_norm_eps", layer_norm_eps, 0)
    for name, parameter in (("gamma", gamma), ("beta", beta)):
        _check_affine(name, parameter, x, "x")
    return _normalise(x, gamma, beta, layer_norm, layer_norm_eps)


def _normalise(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, layer_norm: str | None, layer_norm_eps: float
) -> Tensor:
    if layer_norm is not None:
        over = (-3, -1) if layer_norm == "token" else (-1,)
        centred = x - x.mean(over, keepdim=True)
        x = centred * torch.rsqrt(centred.square().mean(over, keepdim=True) + layer_norm_eps)
    if gamma is not None:
        x = x * gamma.reshape(-1, 1, x.shape[-1])
    if beta is not None:
        x = x + beta.reshape(-1, 1, x.shape[-1])
    return x


def num_features(feature_map: str, feature_dim: int) -> int:
    """F, the length of phi(x) for x of length d."""
    _check_name("feature_map", feature_map, FEATURE_MAPS)
    feature_dim = check_size("feature_dim", feature_dim, 1)
    symmetric = feature_dim * (feature_dim + 1) // 2
    return {"outer": symmetric, "taylor": 1 + feature_dim + symmetric}.get(feature_map, feature_dim)


def circulant(x: Tensor) -> Tensor:
    """The d (d + 1) / 2 products of two entries of x: (e, i) -> x_i x_((i+e) mod d), e = 0..d//2.

    For even d the second half of the last offset repeats the first and is left out.
    """
    _check_rows("x", x, 1)
    return _circulant(x)


def _circulant(x: Tensor) -> Tensor:
    d = x.shape[-1]
    rotated = torch.cat([x, x], -1).unfold(-1, d, 1)[..., : d // 2 + 1, :]  # (..., e, i)
    return (x.unsqueeze(-2) * rotated).flatten(-2)[..., : d * (d + 1) // 2]


def key_features(k: Tensor, feature_map: str = "outer") -> Tensor:
    """phi(k') as the states hold it, without scale or weights: (..., d) -> (..., F)."""
    _check_rows("k", k, 1)
    _check_name("feature_map", feature_map, FEATURE_MAPS)
    return _key_features(k, feature_map)


def _key_features(k: Tensor, feature_map: str) -> Tensor:
    if feature_map == "square":
        return k.square()
    if feature_map == "elu":
        return torch.nn.functional.elu(k) + 1
    if feature_map == "identity":
        return k
    if feature_map == "taylor":
        return torch.cat([torch.ones_like(k[..., :1]), k, _circulant(k)], -1)
    return _circulant(k)


def query_features(q: Tensor, feature_map: str = "outer", scale: float | None = None) -> Tensor:
    """phi(q') with what makes its dot product with `key_features` equal sim: (..., d) -> (..., F).

    (s q.k)^2 is a sum over ordered pairs of entries, and `circulant` has every unordered pair once:
    the d squares weigh s^2, all other products 2 s^2. `taylor` takes half of that.
    """
    _check_rows("q", q, 1)
    _check_name("feature_map", feature_map, FEATURE_MAPS)
    return _query_features(q, feature_map, _check_scale(scale))


def _query_features(q: Tensor, feature_map: str, scale: float | None) -> Tensor:
    features = _key_features(q, feature_map)
    if feature_map in ("square", "elu", "identity"):
        return features
    d = q.shape[-1]
    s = d**-0.5 if scale is None else scale
    weight = [q.new_full((d,), s * s), q.new_full((d * (d - 1) // 2,), 2 * s * s)]
    if feature_map == "taylor":
        weight = [q.new_ones(1), q.new_full((d,), s), *(w / 2 for w in weight)]
    return features * torch.cat(weight)


def sim(q: Tensor, k: Tensor, feature_map: str = "outer", scale: float | None = None) -> Tensor:
    """Equation (2) for q' (..., N, d) and k' (..., M, d): (..., N, M).

    With u = s q'.k' it is u^2 for `outer` and 1 + u + u^2 / 2 for `taylor`: no features needed.
    """
    _check_rows("q", q, 2)
    _check_rows("k", k, 2)
    _check_name("feature_map", feature_map, FEATURE_MAPS)
    if k.dtype != q.dtype:
        raise TypeError(f"k: expected q's dtype {q.dtype}, got {k.dtype}")
    if k.device != q.device:
        raise fail("k", f"q's device {q.device}", k.device)
    if k.shape[-1] != q.shape[-1]:
        raise fail("k", f"q's feature dim {q.shape[-1]}", f"shape {tuple(k.shape)}")
    try:
        torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])  # type: ignore[no-untyped-call]
    except RuntimeError:
        allowed = f"sizes that broadcast with q's {tuple(q.shape[:-2])}"
        raise fail("k", allowed, f"shape {tuple(k.shape)}") from None
    return _sim(q, k, feature_map, _check_scale(scale))


def _sim(q: Tensor, k: Tensor, feature_map: str, scale: float | None) -> Tensor:
    if feature_map in ("square", "elu", "identity"):
        return _key_features(q, feature_map) @ _key_features(k, feature_map).mT
    s = q.shape[-1] ** -0.5 if scale is None else scale
    u = s * q @ k.mT
    return u.square() if feature_map == "outer" else 1 + u + u.square() / 2


def attention_matrix(
    q: Tensor,
    k: Tensor,
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
) -> Tensor:
    """The matrix A of `rebased_attention`: y = A v, for looking at where a model attends.

    A(i, j) = sim(i, j) / (sum_{j<=i} sim(i, j) + eps) for j <= i, and 0 above the diagonal. This is the
    quadratic form: it takes O(N^2) time and memory, in plain torch on any device, with gradients.

    Args:
        q: (B, Hq, N, d), in a dtype of `rebased_attention`.
        k: (B, Hkv, N, d); query head h reads kv head h // (Hq / Hkv).
        gamma_q, beta_q, gamma_k, beta_k, feature_map, layer_norm, scale, eps, layer_norm_eps: as in
            `rebased_attention`, with its defaults.
        normalize: False leaves out the division, as there: A(i, j) = sim(i, j).

    Returns:
        A (B, Hq, N, N), float32, or float64 for float64 inputs. With `normalize` a row sums to 1, short of
        eps.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what is allowed and what was given.
    """
    check_qkv(q, k, k, "N, ", of_op=False)
    options = (feature_map, layer_norm, scale, eps, layer_norm_eps, normalize)
    _, _, scale, eps, layer_norm_eps, normalize = check_options(*options, q.shape[3])
    q = _normalise(*_widen("q", q, gamma_q, beta_q), layer_norm, layer_norm_eps)
    k = _normalise(*_widen("k", k, gamma_k, beta_k), layer_norm, layer_norm_eps)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    attention = _sim(q, k, feature_map, scale).tril()
    return attention / (attention.sum(-1, keepdim=True) + eps) if normalize else attention


def quadratic(q: Tensor, k: Tensor, v: Tensor, *affine: Tensor | None, **options: Any) -> Result:
    """Equation (3) as it stands, O(N^2). Arguments and results: the head of this module."""
    return _attend(_quadratic, q, k, v, *affine, **options)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, *affine: Tensor | None, chunk: int = 64, **options: Any
) -> Result:
    """(3) within a chunk, (4) and (5) between chunks, O(N). Arguments: the head of this module.

    chunk: how many tokens a chunk has, at least 1.
    """
    chunk = check_size("chunk", chunk, 1)
    return _attend(partial(_chunked, chunk=chunk), q, k, v, *affine, **options)


def recurrent(q: Tensor, k: Tensor, v: Tensor, *affine: Tensor | None, **options: Any) -> Result:
    """Equations (4) and (5), token by token. Arguments and results: the head of this module."""
    return _attend(_recurrent, q, k, v, *affine, **options)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: State, *affine: Tensor | None, **options: Any
) -> tuple[Tensor, State]:
    """One token of `recurrent`: q (B, Hq, d), k (B, Hkv, d), v (B, Hkv, dv) -> y (B, Hq, dv).

    state: of B sequences, not updated: the result has the next one.
    """
    check_qkv(q, k, v, "", of_op=False)
    features = num_features(options.get("feature_map", "outer"), q.shape[2])
    check_state("state", state, (q.shape[0], k.shape[1], features, v.shape[2]), "sequences", q)
    for name, x in zip(("q", "k", "v", "state.kv", "state.k"), (q, k, v, *state), strict=True):
        check_memory(name, x)
    if options.get("cu_seqlens") is not None:
        raise TypeError("cu_seqlens: expected None, as step takes one token of each sequence")
    q, k, v = (x.unsqueeze(2) for x in (q, k, v))
    y, state = recurrent(q, k, v, *affine, initial_state=state, return_state=True, **options)
    return y.squeeze(2), state


# The three forms of the sums in (3), each going on from the state of what came before. `group`
# query heads share a kv head. The denominator is the numerator of v = 1: v has a last column of
# ones, and the state is [kv, k].
#     q (B, Hkv, group, N, d)   k (B, Hkv, 1, N, d)   v (B, Hkv, 1, N, dv + 1)
#     sums (B, Hkv, group, N, dv + 1)   state (B, Hkv, 1, F, dv + 1)
Form = Callable[[Tensor, Tensor, Tensor, Tensor, str, float | None], tuple[Tensor, Tensor]]


def _quadratic(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, feature_map: str, scale: float | None
) -> tuple[Tensor, Tensor]:
    sums, added = _one_chunk(q, k, v, state, feature_map, scale)
    return sums, state + added


def _one_chunk(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, feature_map: str, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The sums of a chunk, and what its tokens add to the state."""
    sums = _sim(q, k, feature_map, scale).tril() @ v + _query_features(q, feature_map, scale) @ state
    return sums, _key_features(k, feature_map).mT @ v


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    feature_map: str,
    scale: float | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    # What rounding takes from the state goes back into it with the next chunk (compensated summation): a
    # float32 state of many chunks would else be off by the more, the more chunks there are.
    sums, carry = [], torch.zeros_like(state)
    for q_c, k_c, v_c in _split(chunk, q, k, v):
        sums_c, added = _one_chunk(q_c, k_c, v_c, state, feature_map, scale)
        sums.append(sums_c)
        corrected = added + carry
        before, state = state, state + corrected
        carry = (corrected - (state - before)).detach()
    return torch.cat(sums, -2), state


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, feature_map: str, scale: float | None
) -> tuple[Tensor, Tensor]:
    sums = []
    for q_t, k_t, v_t in _split(1, q, k, v):
        state = state + _key_features(k_t, feature_map).mT @ v_t
        sums.append(_query_features(q_t, feature_map, scale) @ state)
    return torch.cat(sums, -2), state


def _split(length: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors' rows, `length` tokens at a time (once, with none, where N = 0)."""
    return zip(*(torch.split(x, length, -2) for x in tensors), strict=True)


def _attend(
    form: Form,
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
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """Everything around a form's sums: (1), groups of heads, sequences, the division of (3)."""
    check_qkv(q, k, v, "N, ", of_op=False)
    options = (feature_map, layer_norm, scale, eps, layer_norm_eps, normalize)
    _, _, scale, eps, layer_norm_eps, normalize = check_options(*options, q.shape[3])
    return_state = check_bool("return_state", return_state)
    sequences = q.shape[0]
    bounds = None if cu_seqlens is None else _bounds(cu_seqlens, q)
    if bounds is not None:
        sequences = len(bounds) - 1
    if initial_state is not None:
        sizes = (sequences, k.shape[1], num_features(feature_map, q.shape[3]), v.shape[3])
        check_state("initial_state", initial_state, sizes, "sequences", q)
        for part, x in zip(("kv", "k"), initial_state, strict=True):
            check_memory(f"initial_state.{part}", x)
    check_memory("v", v)

    dtype, kv_heads = q.dtype, k.shape[1]
    q = _normalise(*_widen("q", q, gamma_q, beta_q), layer_norm, layer_norm_eps)
    k = _normalise(*_widen("k", k, gamma_k, beta_k), layer_norm, layer_norm_eps)
    v = v.to(q.dtype)
    q = torch.unflatten(q, 1, (kv_heads, q.shape[1] // kv_heads))
    k = k.unsqueeze(2)
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1).unsqueeze(2)

    if initial_state is None:
        features = num_features(feature_map, k.shape[-1])
        state = v.new_zeros(sequences, kv_heads, 1, features, v.shape[-1])
    else:
        kv, k_sum = initial_state
        state = torch.cat([kv, k_sum.unsqueeze(-1)], -1).to(q.dtype).unsqueeze(2)

    def rows(first: int, last: int, state: Tensor) -> tuple[Tensor, Tensor]:
        q_r, k_r, v_r = (x[..., first:last, :] for x in (q, k, v))
        sums, state = form(q_r, k_r, v_r, state, feature_map, scale)
        y = sums[..., :-1] / (sums[..., -1:] + eps) if normalize else sums[..., :-1]
        return y, state

    if bounds is None:
        y, state = rows(0, q.shape[-2], state)
    else:
        before, after = (
            v.new_zeros(*q.shape[:-2], length, v.shape[-1] - 1)
            for length in (bounds[0], q.shape[-2] - bounds[-1])
        )
        done = [rows(bounds[i], bounds[i + 1], state[i : i + 1]) for i in range(sequences)]
        y = torch.cat([before, *(piece for piece, _ in done), after], -2)
        state = torch.cat([state[:0], *(last for _, last in done)])

    y = y.flatten(1, 2).to(dtype)
    state = state.squeeze(2)
    return (y, (state[..., :-1], state[..., -1])) if return_state else y


def _widen(
    name: str, x: Tensor, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The type that sums are taken in: float32, or float64 where x is float64. `name`: q or k, checked."""
    check_memory(name, x)
    for parameter, value in (("gamma", gamma), ("beta", beta)):
        _check_affine(f"{parameter}_{name}", value, x)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.to(dtype),
        None if gamma is None else gamma.to(dtype),
        None if beta is None else beta.to(dtype),
    )


def _bounds(cu_seqlens: Tensor, q: Tensor) -> list[int]:
    """The values of cu_seqlens, checked."""
    index = check_index("cu_seqlens", cu_seqlens, q)
    if q.shape[0] != 1:
        raise fail("q", "batch size 1 where cu_seqlens is given", f"shape {tuple(q.shape)}")
    bounds: list[int] = index.tolist()
    check_bounds(bounds, q.shape[2])
    return bounds


def _check_rows(name: str, x: object, dims: int) -> None:
    """x (..., d), of at least `dims` dimensions and one feature."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    check_layout(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if x.dim() < dims or x.shape[-1] < 1:
        allowed = f"at least {dims} dimensions, and one feature in the last"
        raise fail(name, allowed, f"shape {tuple(x.shape)}")
    check_memory(name, x)


def _check_affine(name: str, parameter: Tensor | None, x: Tensor, called: str = "q") -> None:
    """gamma or beta of x, which errors call `called`."""
    check_parameter(name, parameter, x.shape[1], x, called)
    if parameter is not None:
        check_memory(name, parameter)


def _check_scale(scale: float | None) -> float | None:
    return None if scale is None else check_number("scale", scale)


def _check_name(name: str, value: object, allowed: tuple[str | None, ...]) -> None:
    if not (value is None or isinstance(value, str)) or value not in allowed:
        raise ValueError(f"{name}: must be one of {allowed}, got {value!r}")
