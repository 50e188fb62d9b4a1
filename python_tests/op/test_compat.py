"""The compatible calls against the formulas that their originals publish, written out here."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import relative_error
from torch import Tensor, nn

from rebased_cuda import rebased_attention, rebased_attention_step, reference
from rebased_cuda.compat import (
    FACTORY_KEYWORDS,
    FORWARD_KEYWORDS,
    ReBased,
    chunk_linear_attn,
    fused_chunk_based,
    fused_chunk_linear_attn,
    fused_recurrent_linear_attn,
    parallel_based,
    parallel_rebased,
)
from rebased_cuda.state import RebasedState

LIMITS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def _qkv(dtype: torch.dtype, *, positive: bool = False, batch: int = 2, seqlen: int = 37) -> list[Tensor]:
    """(B, T, H, width), with 5 features and values of width 7."""
    q, k, v = (torch.randn(batch, seqlen, 3, width, dtype=torch.float64) for width in (5, 5, 7))
    if positive:
        q, k = q.exp(), k.exp()
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def _agree(ours: Any, formula: Any, inputs: list[Tensor], *arguments: Any, **options: Any) -> None:
    """Values and gradients of a call against those of `formula` on the same numbers in float64."""
    limit = LIMITS[inputs[0].dtype]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results, expected = ours(*inputs, *arguments, **options), formula(*exact)
    results, expected = (x if isinstance(x, tuple) else (x,) for x in (results, expected))
    weights = [torch.randn_like(x) for x in expected]
    sum((x * w.to(x.dtype)).sum() for x, w in zip(results, weights, strict=True)).backward()
    sum((x * w).sum() for x, w in zip(expected, weights, strict=True)).backward()
    for x, y in zip((*results, *inputs), (*expected, *exact), strict=True):
        assert relative_error(x.detach(), y.detach()) <= limit
        if x.is_leaf:
            assert relative_error(x.grad, y.grad) <= limit


# ---- fla.ops.rebased.parallel_rebased ----


def _rebased_sums(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o (B, H, T, V) = sum_{s <= t} (scale q_t.k_s)^2 v_s, and z (B, H, T), the same with v = 1."""
    sim = (scale * torch.einsum("bthd,bshd->bhts", q, k)) ** 2
    sim = sim * torch.ones(sim.shape[-2:], dtype=sim.dtype).tril()
    return torch.einsum("bhts,bshv->bhtv", sim, v), sim.sum(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("use_scale", [True, False])
def test_parallel_rebased(dtype, use_scale):
    scale = 5**-0.5 if use_scale else 1.0

    def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, z = _rebased_sums(q, k, v, scale)
        return (o / (z[..., None] + 0.3)).transpose(1, 2)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _rebased_sums(q, k, v, scale)[0].transpose(1, 2)

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _rebased_sums(q, k, v, scale)

    _agree(parallel_rebased, normalised, _qkv(dtype), 0.3, use_scale)
    _agree(parallel_rebased, plain, _qkv(dtype), use_scale=use_scale, use_normalize=False)
    _agree(parallel_rebased, both, _qkv(dtype), use_scale=use_scale, return_both=True)


def test_parallel_rebased_defaults_and_layouts():
    q, k, v = _qkv(torch.float64)
    o, z = _rebased_sums(q, k, v, 5**-0.5)
    expected = (o / (z[..., None] + 1e-5)).transpose(1, 2)
    assert relative_error(parallel_rebased(q, k, v), expected) <= 1e-12
    head_first = parallel_rebased(*(x.transpose(1, 2) for x in (q, k, v)), head_first=True)
    assert relative_error(head_first, expected.transpose(1, 2)) <= 1e-12
    assert parallel_rebased(*_qkv(torch.bfloat16)).dtype == torch.bfloat16


def test_parallel_rebased_mistakes():
    q, k, v = _qkv(torch.float32)
    with pytest.raises(ValueError, match="q: expected a feature dim from 1 to 128"):
        parallel_rebased(q.repeat(1, 1, 1, 26), k.repeat(1, 1, 1, 26), v)
    with pytest.raises(ValueError, match="v: expected a width up to 255 with return_both"):
        parallel_rebased(q, k, torch.zeros(2, 37, 3, 256), return_both=True)
    with pytest.raises(ValueError, match=r"k: expected shape \(B, T, H, width\)"):
        parallel_rebased(q, k[0], v)


# ---- fla.ops.based ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [None, 1])
@pytest.mark.parametrize("use_norm", [True, False])
@pytest.mark.parametrize("function", [parallel_based, fused_chunk_based])
def test_based(function, dtype, scale, use_norm):
    factor = 5**-0.5 if scale is None else scale

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        u = factor * torch.einsum("bthd,bshd->bhts", q, k)
        sim = (1 + u + u * u / 2).tril()
        o = torch.einsum("bhts,bshv->bthv", sim, v)
        return o / (sim.sum(-1).transpose(1, 2)[..., None] + 1e-6) if use_norm else o

    _agree(function, formula, _qkv(dtype), scale=scale, use_norm=use_norm)
    q, k, v = _qkv(dtype)
    head_first = function(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=scale, use_norm=use_norm, head_first=True
    )
    assert relative_error(head_first.transpose(1, 2), formula(*(x.double() for x in (q, k, v)))) <= 2e-5


def test_based_mistakes():
    q, k, v = _qkv(torch.float32)
    for name, values in {
        "scale": (NAN, "1", True),
        "use_norm": (1, None, "yes"),
        "head_first": (1, None, "yes"),
        "q": (None, [1.0], torch.zeros(2, 37, 3), torch.zeros(2, 37, 3, 129)),
        "k": (None, torch.zeros(2, 36, 3, 5)),
        "v": (None, torch.zeros(2, 37, 3, 257)),
    }.items():
        for value in values:
            for function in (parallel_based, fused_chunk_based):
                with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
                    function(**{"q": q, "k": k, "v": v, name: value})


# ---- fla.ops.linear_attn ----


def _linear(
    q: Tensor, k: Tensor, v: Tensor, scale: float, normalize: bool, kv: Any = 0.0, z: Any = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token: o (B, T, H, V), kv (B, H, K, V), z (B, H, K)."""
    rows = []
    for t in range(q.shape[1]):
        kv = kv + k[:, t, :, :, None] * v[:, t, :, None, :]
        z = z + k[:, t]
        o = torch.einsum("bhk,bhkv->bhv", scale * q[:, t], kv)
        rows.append(o / ((scale * q[:, t] * z).sum(-1, keepdim=True) + 1e-10) if normalize else o)
    return torch.stack(rows, 1), kv, z


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_chunk_linear_attn(dtype, normalize, scale):
    factor = 5**-0.5 if scale is None else scale

    def expected(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        o, kv, z = _linear(q, k, v, factor, normalize)
        return (o, kv, z[:, None]) if normalize else (o, kv)

    def ours(*inputs: Tensor) -> tuple[Tensor, ...]:
        o, state = chunk_linear_attn(*inputs, scale=scale, normalize=normalize, output_final_state=True)
        return (o, *state) if normalize else (o, state)

    _agree(ours, expected, _qkv(dtype, positive=normalize))


@pytest.mark.parametrize("normalize", [True, False])
def test_chunk_linear_attn_goes_on_from_a_state(normalize):
    q, k, v = _qkv(torch.float64, positive=True)
    whole, state = chunk_linear_attn(q, k, v, normalize=normalize, output_final_state=True)
    state_of = None
    pieces = []
    for rows in (slice(0, 11), slice(11, 37)):
        o, state_of = chunk_linear_attn(
            q[:, rows], k[:, rows], v[:, rows], None, state_of, True, normalize=normalize
        )
        pieces.append(o)
    assert relative_error(torch.cat(pieces, 1), whole) <= 1e-12
    for x, y in zip(state_of, state, strict=True):
        assert relative_error(x, y) <= 1e-12
    if normalize:  # kv alone: the sum of sim counts from these tokens on
        kv = state[0]
        o, _ = chunk_linear_attn(q, k, v, initial_state=kv)
        assert relative_error(o, _linear(q, k, v, 5**-0.5, True, kv)[0]) <= 1e-12


def test_chunk_linear_attn_packed():
    q, k, v = _qkv(torch.float64, positive=True, batch=1)
    bounds = [0, 9, 9, 37]
    kv, z = (torch.rand(3, *shape, dtype=torch.float64) for shape in ((3, 5, 7), (1, 3, 5)))
    o, state = chunk_linear_attn(
        q,
        k,
        v,
        initial_state=(kv, z),
        output_final_state=True,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
    )
    for s, (first, last) in enumerate(pairwise(bounds)):
        if first == last:
            assert torch.equal(state[0][s], kv[s])
            continue
        rows = (x[:, first:last] for x in (q, k, v))
        expected = _linear(*rows, 5**-0.5, True, kv[s : s + 1], z[s : s + 1, 0])
        for x, y in zip(
            (o[:, first:last], state[0][s], state[1][s, 0]),
            (expected[0], *(e[0] for e in expected[1:])),
            strict=True,
        ):
            assert relative_error(x, y) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("features", [130, 300])
def test_more_features_than_the_op_takes(dtype, normalize, features):
    """In two pieces and packed, so that states go in and out."""
    q, k = (torch.rand(1, 23, 2, features, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, 23, 2, 6, dtype=torch.float64)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        o, kv, z = _linear(q, k, v, features**-0.5, normalize)
        return (o, kv, z[:, None]) if normalize else (o, kv)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        first, state = chunk_linear_attn(q[:, :9], k[:, :9], v[:, :9], None, None, True, normalize)
        rest = (x[:, 9:] for x in (q, k, v))
        bounds = torch.tensor([0, 14])
        last, state = chunk_linear_attn(*rest, None, state, True, normalize, cu_seqlens=bounds)
        o = torch.cat([first, last], 1)
        return (o, *state) if normalize else (o, state)

    if dtype == torch.bfloat16:
        rounded = [x.to(dtype) for x in (q, k, v)]
        o, *states = ours(*rounded)
        assert o.dtype == dtype
        assert all(state.dtype == torch.float32 for state in states)
        for x, y in zip((o, *states), expected(*(x.double() for x in rounded)), strict=True):
            assert relative_error(x, y) <= (4e-3 if x is o else 2e-5)
        return
    _agree(ours, expected, [x.to(dtype).requires_grad_() for x in (q, k, v)])


def _rebased_features(x: Tensor) -> Tensor:
    """fla's RebasedFeatureMap without its LayerNorm: squares, then products of pairs, (q.k)^2 / d of both."""
    width = x.shape[-1]
    i, j = torch.triu_indices(width, width, 1)
    return torch.cat([x * x * width**-0.5, x[..., i] * x[..., j] * (2 / width) ** 0.5], -1)


def test_the_features_of_flas_layers_give_what_the_maps_give():
    q, k, v = (torch.randn(2, 29, 3, width, dtype=torch.float64) for width in (16, 16, 7))
    features = [_rebased_features(x) for x in (q, k)]
    assert features[0].shape[-1] == 136
    o, _ = fused_chunk_linear_attn(*features, v, scale=1)
    assert relative_error(o, parallel_rebased(q, k, v, eps=1e-10)) <= 1e-9


@pytest.mark.parametrize("features", [5, 130])
def test_the_other_calls_of_linear_attention(features):
    q, k = (torch.rand(2, 37, 3, features, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 37, 3, 7, dtype=torch.float64)
    for normalize in (True, False):
        expected = chunk_linear_attn(q, k, v, 0.3, None, True, normalize)
        for function in (fused_chunk_linear_attn, fused_recurrent_linear_attn):
            o, state = function(q, k, v, 0.3, output_final_state=True, normalize=normalize)
            again, _ = function(q, k, v, 0.3, initial_state=state, normalize=normalize)
            assert torch.equal(o, expected[0])
            for x, y in zip(*((s if normalize else (s,)) for s in (state, expected[1])), strict=True):
                assert torch.equal(x, y)
            assert torch.equal(again, chunk_linear_attn(q, k, v, 0.3, expected[1], False, normalize)[0])
    assert torch.equal(fused_chunk_linear_attn(q, k, v)[0], chunk_linear_attn(q, k, v)[0])
    plain = chunk_linear_attn(q, k, v, normalize=False)[0]  # its own default
    assert torch.equal(fused_recurrent_linear_attn(q, k, v)[0], plain)
    with pytest.raises(ValueError, match="reverse: expected False, got True; flip"):
        fused_recurrent_linear_attn(q, k, v, reverse=True)
    with pytest.raises(TypeError, match="reverse: "):
        fused_recurrent_linear_attn(q, k, v, reverse=1)


def test_chunk_linear_attn_defaults_and_mistakes():
    q, k, v = _qkv(torch.float32, positive=True)
    o, state = chunk_linear_attn(q, k, v)
    assert state is None
    assert relative_error(o, _linear(q, k, v, 5**-0.5, True)[0]) <= 2e-5
    wide = torch.zeros(2, 37, 3, 130)
    with pytest.raises(ValueError, match="k: expected q's 130 features, got 131"):
        chunk_linear_attn(wide, torch.zeros(2, 37, 3, 131), v)
    with pytest.raises(ValueError, match="v: expected a width up to 255 with 130 features, got 256"):
        chunk_linear_attn(wide, wide, torch.zeros(2, 37, 3, 256))
    with pytest.raises(ValueError, match="initial_state: expected kv of shape"):
        chunk_linear_attn(wide, wide, v, initial_state=torch.zeros(2, 3, 128, 7))
    with pytest.raises(TypeError, match="initial_state: expected one tensor"):
        chunk_linear_attn(q, k, v, initial_state=(None, None), normalize=False)
    with pytest.raises(ValueError, match="initial_state: expected z of shape"):
        chunk_linear_attn(q, k, v, initial_state=(None, torch.zeros(2, 3, 5)))
    with pytest.raises(ValueError, match="initial_state: expected kv of shape"):
        chunk_linear_attn(q, k, v, initial_state=torch.zeros(2, 3, 5, 8), normalize=False)


NAN, INF = float("nan"), float("inf")
BAD_REBASED = {
    "eps": (NAN, INF, -1.0, "1", None, True),
    "use_scale": (1, None, "yes", 0.5),
    "use_normalize": (1, None, "yes"),
    "return_both": (1, None, "yes"),
    "head_first": (1, None, "yes"),
    "q": (None, [1.0], torch.zeros(2, 37, 3), torch.zeros(2, 37, 4, 5), torch.zeros(2, 37, 3, 5).long()),
    "k": (None, [1.0], torch.zeros(2, 37, 3), torch.zeros(2, 36, 3, 5), torch.zeros(2, 37, 3, 5).half()),
    "v": (None, [1.0], torch.zeros(2, 37, 3), torch.zeros(2, 36, 3, 5), torch.zeros(2, 37, 3, 257)),
}


@pytest.mark.parametrize("name", BAD_REBASED)
@pytest.mark.parametrize("options", [{}, {"return_both": True}, {"head_first": True}], ids=str)
def test_parallel_rebased_names_its_own_argument(name, options):
    given = dict(zip("qkv", _qkv(torch.float32), strict=True))
    if options.get("head_first"):
        given = {key: x.transpose(1, 2) for key, x in given.items()}
    for value in BAD_REBASED[name]:
        if options.get("head_first") and isinstance(value, Tensor) and value.dim() == 4:
            value = value.transpose(1, 2)
        with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
            parallel_rebased(**{**given, **options, name: value})


BAD_LINEAR = {
    "scale": (NAN, INF, "1", True, torch.tensor(1.0)),
    "output_final_state": (1, None, "yes"),
    "normalize": (1, None, "yes"),
    "cu_seqlens": ([0, 37], torch.tensor([0.0, 37.0]), torch.tensor([[0, 37]]), torch.tensor([0, 38])),
    "initial_state": (
        [None, None],
        "x",
        (None,),
        (None, None, None),
        ("kv", None),
        (None, 1.0),
        torch.zeros(2, 3, 5, 8),
        torch.zeros(3, 3, 5, 7),
        torch.zeros(1, 3, 5, 7).long(),
        torch.zeros(1, 3, 5, 7, dtype=torch.complex64),
        torch.zeros(1, 3, 5, 7).to_sparse(),
        torch.zeros(1, 3, 5, 7, device="meta"),
        (None, torch.zeros(1, 1, 3, 6)),
        (None, torch.zeros(1, 1, 3, 5).int()),
        (None, torch.zeros(1, 1, 3, 5, device="meta")),
        (torch.zeros(3, 5, 7), None),
    ),
}


@pytest.mark.parametrize("name", BAD_LINEAR)
def test_chunk_linear_attn_names_its_own_argument(name):
    q, k, v = _qkv(torch.float32, positive=True, batch=1)
    states: dict[str, Any] = {"initial_state": torch.zeros(1, 3, 5, 7)}
    for value in BAD_LINEAR[name]:
        for more in ({}, states):  # a state is read before the op checks
            with pytest.raises((ValueError, TypeError), match=f"^(rebased_cuda: )?{name}: "):
                chunk_linear_attn(q, k, v, **{**more, name: value})


def test_an_initial_state_of_any_floating_dtype():
    q, k, v = _qkv(torch.float32, positive=True)
    kv, z = torch.rand(2, 3, 5, 7), torch.rand(2, 1, 3, 5)
    expected, _ = chunk_linear_attn(q, k, v, initial_state=(kv.double(), z.double()))
    given, _ = chunk_linear_attn(q, k, v, initial_state=(kv, z))
    assert torch.equal(given, expected)
    nothing, _ = chunk_linear_attn(q, k, v, initial_state=(None, None))
    torch.testing.assert_close(nothing, chunk_linear_attn(q, k, v)[0])  # which may take a path without states


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            parallel_rebased,
            "q, k, v, eps=1e-05, use_scale=True, use_normalize=True, return_both=False, head_first=False",
        ),
        (
            chunk_linear_attn,
            "q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True, "
            "cu_seqlens=None",
        ),
        (
            fused_chunk_linear_attn,
            "q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True, "
            "cu_seqlens=None",
        ),
        (
            fused_recurrent_linear_attn,
            "q, k, v, scale=None, initial_state=None, output_final_state=False, reverse=False, "
            "normalize=False, cu_seqlens=None",
        ),
        (parallel_based, "q, k, v, scale=None, use_norm=True, head_first=False"),
        (fused_chunk_based, "q, k, v, scale=None, use_norm=True, head_first=False"),
        (
            ReBased,
            "d_model, l_max=2048, feature_dim=16, num_key_value_heads=12, num_heads=12, "
            "feature_name='taylor_exp', eps=1e-12, causal=True, mode='parallel', use_beta=True, "
            "use_gamma=True, normalize=True, factory",
        ),
    ],
)
def test_signatures(function, expected):
    parameters = inspect.signature(function).parameters.values()
    names = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert ", ".join(names) == expected


# ---- the feature map that chunk_linear_attn needs ----


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("normalize", [True, False])
def test_identity_is_a_map_like_the_others(device, kv_heads, normalize):
    """Values, gradients, states and the step, LayerNorm and affine included."""
    generator = torch.Generator().manual_seed(0)
    sizes = (
        (1, 4, 9, 3),
        (1, kv_heads, 9, 3),
        (1, kv_heads, 9, 2),
        (4, 3),
        (4, 3),
        (kv_heads, 3),
        (kv_heads, 3),
    )
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    for beta in (4, 6):  # far from where a sum of q'.k' has its roots
        tensors[beta] = 5 + tensors[beta].abs()
    tensors = [x.to(device).requires_grad_() for x in tensors]
    options: dict[str, Any] = {
        "feature_map": "identity",
        "layer_norm": "head",
        "eps": 1e-3,
        "normalize": normalize,
    }

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        y, state = rebased_attention(*inputs, **options, return_state=True)
        return (y, *state)

    expected = reference.quadratic(*tensors, **options, return_state=True)
    for x, y in zip(function(*tensors), (expected[0], *expected[1]), strict=True):
        assert relative_error(x, y) <= 1e-12
    assert torch.autograd.gradcheck(function, tensors, eps=1e-4, atol=1e-6, rtol=1e-5)

    with torch.no_grad():
        q, k, v, *affine = tensors
        state = RebasedState.zeros(
            1, kv_heads, 3, 2, feature_map="identity", dtype=torch.float64, device=device
        )
        for t in range(9):
            y = rebased_attention_step(q[:, :, t], k[:, :, t], v[:, :, t], state, *affine, **options)
            assert relative_error(y, expected[0][:, :, t]) <= 1e-12


# ---- the authors' mixer ----

LAYER_NORM = {"use_beta": True, "use_gamma": True, "normalize": True}
WAYS = {
    "layer norm": LAYER_NORM,
    "gamma and beta": {**LAYER_NORM, "normalize": False},
    "gamma": {"use_beta": False, "use_gamma": True, "normalize": False},
    "none": {"use_beta": False, "use_gamma": False, "normalize": False},
}


def _mixer(x: Tensor, weights: dict[str, Tensor], way: str, heads: int) -> Tensor:
    """Projections, the norm over all heads' features of a token, (q.k)^2 / d, its row sums + 1e-12."""
    q, k, v = (x @ weights[f"proj_{name}.weight"].T for name in "qkv")
    if way == "layer norm":
        q, k = (
            nn.functional.layer_norm(
                y, y.shape[-1:], weights[f"ln_{name}.weight"], weights[f"ln_{name}.bias"], 1e-5
            )
            for y, name in ((q, "q"), (k, "k"))
        )
    elif way != "none":
        q, k = (
            y * weights[f"ln_{name}.gamma"] + (weights[f"ln_{name}.beta"] if "beta" in way else 0)
            for y, name in ((q, "q"), (k, "k"))
        )
    q, k, v = (y.unflatten(-1, (heads, -1)) for y in (q, k, v))
    o, z = _rebased_sums(q, k, v, q.shape[-1] ** -0.5)
    o = (o / (z[..., None] + 1e-12)).transpose(1, 2).flatten(2)
    return o @ weights["proj_o.weight"].T


@pytest.mark.parametrize("way", WAYS)
def test_mixer(way):
    mixer = ReBased(12, feature_dim=5, num_key_value_heads=3, num_heads=3, **WAYS[way]).double()
    shapes = {"proj_q.weight": (15, 12), "proj_k.weight": (15, 12)}
    shapes |= {"proj_v.weight": (12, 12), "proj_o.weight": (12, 12)}
    names = {"layer norm": ("weight", "bias"), "none": ()}.get(way, ("gamma", "beta"))
    shapes |= {f"ln_{side}.{name}": (15,) for side in "qk" for name in names}
    checkpoint = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    mixer.load_state_dict(checkpoint)  # strict: the names and shapes of the original's checkpoints
    weights = {name: x.requires_grad_() for name, x in checkpoint.items()}

    x = torch.randn(2, 19, 12, dtype=torch.float64, requires_grad=True)
    y = mixer(x, position_ids=None)
    assert relative_error(y, _mixer(x, weights, way, 3)) <= 1e-12
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    gradient, x.grad = x.grad, None
    _mixer(x, weights, way, 3).backward(grad_y)
    assert relative_error(gradient, x.grad) <= 1e-9  # without a norm first tokens are ill-conditioned
    for name, parameter in mixer.named_parameters():
        if weights[name].grad is None:
            assert parameter.grad is None
        else:
            assert relative_error(parameter.grad, weights[name].grad) <= 1e-9, name


def test_the_mixer_ignores_what_factories_hand_in_and_nothing_else():
    made = ReBased(d_model=12, feature_dim=5, num_heads=3, num_key_value_heads=3, layer_idx=4, l_max=64)
    assert set(FACTORY_KEYWORDS) >= {"layer_idx"}
    ReBased(12, 2048, 5, 3, 3, **dict.fromkeys(FACTORY_KEYWORDS))
    with pytest.raises(TypeError, match="dropout: unexpected keyword of ReBased,"):
        ReBased(12, 2048, 5, 3, 3, dropout=0.1)
    x = torch.randn(1, 4, 12)
    assert torch.equal(made(x, **dict.fromkeys(FORWARD_KEYWORDS)), made(x))
    with pytest.raises(TypeError, match=r"past_key_values: unexpected keyword of ReBased\.forward,"):
        made(x, past_key_values=None)


def test_mixer_defaults():
    mixer = ReBased(768)
    assert sum(p.numel() for p in mixer.parameters()) == 2 * 768 * 192 + 2 * 768**2 + 4 * 192
    assert mixer(torch.zeros(1, 3, 768)).shape == (1, 3, 768)


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("num_key_value_heads", {"num_key_value_heads": 4}),
        ("causal", {"causal": False}),
        ("mode", {"mode": "fused_chunk"}),
        ("normalize", {"use_gamma": False}),
        ("normalize", {"use_beta": False}),
        ("use_beta", {"use_gamma": False, "normalize": False}),
    ],
)
def test_mixer_mistakes(argument, arguments):
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        ReBased(768, **arguments)


BAD_MIXER = {
    "d_model": (0, -1, 12.0, "12", None, True),
    "feature_dim": (0, 129, 5.0, "5", None, True),
    "num_heads": (0, 3.0, "3", None, True),
    "num_key_value_heads": (0, 2, 3.0, "3", None, True),
    "eps": (NAN, INF, -1e-5, "1", None, True),
    "causal": (False, 1, "yes", None),
    "mode": ("chunk", None, 1, ["parallel"]),
    "use_beta": (1, "True", None),
    "use_gamma": (1, "True", None),
    "normalize": (1, "True", None),
}


@pytest.mark.parametrize("name", BAD_MIXER)
def test_mixer_names_its_own_argument(name):
    good = {"d_model": 12, "feature_dim": 5, "num_heads": 3, "num_key_value_heads": 3}
    for value in BAD_MIXER[name]:
        with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
            ReBased(**{**good, name: value})


def test_mixer_names_hidden_states():
    mixer = ReBased(12, feature_dim=5, num_key_value_heads=3, num_heads=3)
    for x in (None, [1.0], torch.zeros(2, 12), torch.zeros(2, 5, 13), torch.zeros(2, 5, 12).to_sparse()):
        with pytest.raises((ValueError, TypeError), match=r"^hidden_states: "):
            mixer(x)
    with pytest.raises(TypeError, match=r"^attention_mask: "):
        mixer(torch.zeros(2, 5, 12), [1, 1])


@pytest.mark.parametrize("use_beta", [True, False])
def test_the_mixers_gamma_comes_from_a_call(use_beta):
    """As that of ReBasedAttention, so that a hook on ln_q or ln_k fires."""
    mixer = ReBased(12, 2048, 5, 3, 3, use_beta=use_beta, normalize=False).double()
    calls = []
    for norm in (mixer.ln_q, mixer.ln_k):
        norm.register_forward_hook(lambda module, given, result: calls.append(module))
    mixer(torch.randn(2, 5, 12, dtype=torch.float64))
    assert calls == [mixer.ln_q, mixer.ln_k]
    with torch.no_grad():
        mixer.ln_q.gamma.uniform_(), mixer.ln_q.beta.uniform_()
    x = torch.randn(4, 15, dtype=torch.float64)
    gamma, beta = mixer.ln_q(None)
    assert torch.equal(mixer.ln_q(x), x * gamma if beta is None else x * gamma + beta)
    assert (beta is not None) == use_beta
