"""reference.py judges everything else, so it is held to formulas written out here a second time."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from rebased_cuda import reference

FORMS = {
    "quadratic": reference.quadratic,
    "chunked": lambda *args, **options: reference.chunked(*args, chunk=4, **options),
    "recurrent": reference.recurrent,
}
HEAD_DIM = {1: 3, 2: 1, 3: 4, 5: 7, 16: 5}  # by feature dim, mostly odd
every_map = pytest.mark.parametrize("feature_map", reference.FEATURE_MAPS)
every_norm = pytest.mark.parametrize("layer_norm", reference.LAYER_NORMS, ids=str)
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
every_dim = pytest.mark.parametrize("feature_dim", HEAD_DIM)


def random_inputs(feature_dim=5, seqlen=13, batch=2, kv_heads=2, group=1, dtype=torch.float64, seed=0):
    """q, k, v and an affine of (heads, d) for q, (d,) for k, so that both shapes are met."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    heads, head_dim = kv_heads * group, HEAD_DIM[feature_dim]
    return SimpleNamespace(
        qkv=[
            randn(batch, heads, seqlen, feature_dim),
            randn(batch, kv_heads, seqlen, feature_dim),
            randn(batch, kv_heads, seqlen, head_dim),
        ],
        affine=[
            1 + randn(heads, feature_dim) / 4,
            randn(heads, feature_dim) / 4,
            1 + randn(feature_dim) / 4,
            randn(feature_dim) / 4,
        ],
    )


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def assert_close(actual, expected, tolerance=1e-12):
    """Relative L2 error of a tensor, or of each tensor of y, (kv, k)."""
    if isinstance(expected, torch.Tensor):
        assert relative_error(actual, expected) <= tolerance
    else:
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, tolerance)


def rows(tensors, first, last):
    return [x[:, :, first:last] for x in tensors]


@every_map
@every_norm
@every_dim
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("resumed", [False, True], ids=["fresh", "resumed"])
def test_three_forms_agree(feature_map, layer_norm, feature_dim, group, packed, resumed):
    """With eps = 1e-2: where all of a row's sim are near 0, as `outer` allows, y is ill-conditioned."""
    x = random_inputs(feature_dim, group=group, batch=1 if packed else 2)
    options = {"feature_map": feature_map, "layer_norm": layer_norm, "return_state": True, "eps": 1e-2}
    bounds = torch.tensor([1, 6, 6, 12]) if packed else None
    if resumed:
        sequences = 3 if packed else 2
        earlier = random_inputs(feature_dim, group=group, batch=sequences, seqlen=6, seed=1)
        _, options["initial_state"] = reference.quadratic(*earlier.qkv, *earlier.affine, **options)
    for normalize in (True, False):
        expected, *others = (
            form(*x.qkv, *x.affine, normalize=normalize, cu_seqlens=bounds, **options)
            for form in FORMS.values()
        )
        for other in others:
            assert_close(other, expected)


@every_map
@every_norm
@pytest.mark.parametrize("form", [FORMS["chunked"], FORMS["recurrent"]], ids=["chunked", "recurrent"])
def test_gradients_agree(feature_map, layer_norm, form):
    x = random_inputs(group=2)
    options = {"feature_map": feature_map, "layer_norm": layer_norm, "return_state": True, "eps": 1e-2}
    _, state = reference.quadratic(*rows(x.qkv, 0, 4), *x.affine, **options)
    leaves = [t.clone().requires_grad_() for t in (*x.qkv, *x.affine, *state)]
    seeds = random_inputs(group=2, seed=1)

    def gradients(form):
        y, (kv, k) = form(*leaves[:7], initial_state=tuple(leaves[7:]), **options)
        loss = (y * seeds.qkv[2].repeat_interleave(2, 1)).sum() + kv.square().sum() + k.square().sum()
        return torch.autograd.grad(loss, leaves)

    assert_close(gradients(form), gradients(reference.quadratic), 1e-11)


@every_form
@every_map
def test_resumed_anywhere_is_the_whole(form, feature_map):
    x = random_inputs(group=2)
    options = {"feature_map": feature_map, "layer_norm": "token", "return_state": True}
    whole = reference.quadratic(*x.qkv, *x.affine, **options)
    for cut in range(14):
        first, state = form(*rows(x.qkv, 0, cut), *x.affine, **options)
        second, last = form(*rows(x.qkv, cut, 13), *x.affine, initial_state=state, **options)
        assert_close((torch.cat([first, second], 2), last), whole)


@every_map
@every_norm
def test_steps_are_the_whole(feature_map, layer_norm):
    x = random_inputs(group=2)
    options = {"feature_map": feature_map, "layer_norm": layer_norm}
    y, state = reference.quadratic(*rows(x.qkv, 0, 3), *x.affine, return_state=True, **options)
    ys = [*y.unbind(2)]
    for t in range(3, 13):
        token = [tensor[:, :, t] for tensor in x.qkv]
        y, state = reference.step(*token, state, *x.affine, **options)
        ys.append(y)
    whole = reference.quadratic(*x.qkv, *x.affine, return_state=True, **options)
    assert_close((torch.stack(ys, 2), state), whole)


def test_chunk_is_64_unless_said():
    x = random_inputs(16, seqlen=150)
    expected = reference.quadratic(*x.qkv, *x.affine, return_state=True)
    assert_close(reference.chunked(*x.qkv, *x.affine, return_state=True), expected)


@every_map
@every_dim
@pytest.mark.parametrize("scale", [None, 0.3])
def test_features_make_sim(feature_map, feature_dim, scale):
    q, k, _ = random_inputs(feature_dim).qkv
    phi_q = reference.query_features(q, feature_map, scale)
    phi_k = reference.key_features(k, feature_map)
    assert phi_k.shape[-1] == phi_q.shape[-1] == reference.num_features(feature_map, feature_dim)
    similarity = reference.sim(q, k, feature_map, scale)
    assert_close(torch.einsum("bhif,bhjf->bhij", phi_q, phi_k), similarity)

    s = feature_dim**-0.5 if scale is None else scale
    u = s * torch.einsum("bhid,bhjd->bhij", q, k)
    by_hand = {
        "outer": u**2,
        "square": torch.einsum("bhid,bhjd->bhij", q**2, k**2),
        "taylor": 1 + u + u**2 / 2,
        "elu": torch.einsum(
            "bhid,bhjd->bhij", torch.where(q > 0, q + 1, q.exp()), torch.where(k > 0, k + 1, k.exp())
        ),
        "identity": torch.einsum("bhid,bhjd->bhij", q, k),
    }
    assert_close(similarity, by_hand[feature_map])


@every_dim
def test_order_of_the_features(feature_dim):
    d = feature_dim
    x = torch.randn(d, dtype=torch.float64)
    products = []
    for e in range(d // 2 + 1):
        entries = d // 2 if 2 * e == d else d
        products += [x[i] * x[(i + e) % d] for i in range(entries)]
    products = torch.stack(products)
    assert len(products) == reference.num_features("outer", d) == d * (d + 1) // 2
    torch.testing.assert_close(reference.key_features(x, "outer"), products, rtol=0, atol=0)
    taylor = torch.cat([torch.ones(1, dtype=x.dtype), x, products])
    assert len(taylor) == reference.num_features("taylor", d) == 1 + d + d * (d + 1) // 2
    torch.testing.assert_close(reference.key_features(x, "taylor"), taylor, rtol=0, atol=0)
    assert reference.num_features("square", d) == reference.num_features("elu", d) == d


@every_map
@every_norm
@pytest.mark.parametrize("normalize", [True, False])
def test_attention_matrix_times_v_is_y(feature_map, layer_norm, normalize):
    x = random_inputs(group=2)
    options = {"feature_map": feature_map, "layer_norm": layer_norm, "normalize": normalize}
    q, k, v = x.qkv
    attention = reference.attention_matrix(q, k, *x.affine, scale=0.4, **options)
    assert attention.shape == (2, 4, 13, 13)
    assert not attention.triu(1).any()
    y = reference.quadratic(q, k, v, *x.affine, scale=0.4, **options)
    assert_close(attention @ v.repeat_interleave(2, 1), y)


def by_hand(q, k, v, feature_map, eps=1e-6):
    """y, row by row, from q' and k' (B, H, N, d)."""
    y = torch.empty_like(v)
    for b, h, i in itertools.product(*(range(n) for n in v.shape[:3])):
        if feature_map == "square":
            weights = [(q[b, h, i] ** 2 * k[b, h, j] ** 2).sum() for j in range(i + 1)]
        else:
            weights = [(q[b, h, i] @ k[b, h, j]) ** 2 / q.shape[-1] for j in range(i + 1)]
        weighted = sum(w * v[b, h, j] for j, w in enumerate(weights))
        y[b, h, i] = weighted / (sum(weights) + eps)
    return y


@every_form
@pytest.mark.parametrize("feature_map", ["square", "outer"])
@pytest.mark.parametrize(
    ("norm", "use_gamma", "use_beta"),
    [
        pytest.param(False, False, False, id="x^2"),
        pytest.param(True, False, False, id="norm(x)^2"),
        pytest.param(False, True, False, id="(gamma x)^2"),
        pytest.param(False, True, True, id="(gamma x + beta)^2"),
        pytest.param(True, True, True, id="ReBased"),
    ],
)
def test_every_row_of_the_papers_ablation_is_a_setting(form, feature_map, norm, use_gamma, use_beta):
    """Table 1 of the paper; its LayerNorm is over all heads' features, 3 * 5 here."""
    q, k, v = random_inputs(kv_heads=3).qkv
    gammas = [torch.linspace(0.5, 1.5, 15).double(), torch.linspace(-1, 2, 15).double()]
    betas = [torch.linspace(-0.5, 0.7, 15).double(), torch.linspace(0.3, -0.2, 15).double()]

    def transformed(x, gamma, beta):
        x = x.transpose(1, 2).flatten(2)  # (B, N, H d)
        if norm:
            x = torch.nn.functional.layer_norm(x, (15,))
        x = x * gamma if use_gamma else x
        x = x + beta if use_beta else x
        return x.unflatten(2, (3, 5)).transpose(1, 2)

    expected = by_hand(
        *(transformed(*args) for args in zip((q, k), gammas, betas, strict=True)), v, feature_map
    )
    gamma_q, gamma_k = (g.view(3, 5) if use_gamma else None for g in gammas)
    beta_q, beta_k = (b.view(3, 5) if use_beta else None for b in betas)
    y = form(
        *(q, k, v, gamma_q, beta_q, gamma_k, beta_k),
        feature_map=feature_map,
        layer_norm="token" if norm else None,
    )
    assert_close(y, expected, 1e-11)


def test_normalise():
    x = random_inputs(kv_heads=3).qkv[0]
    gamma, beta = torch.rand(2, 3, 5, dtype=x.dtype)
    per_head = torch.nn.functional.layer_norm(x, (5,), eps=0.1)
    assert_close(reference.normalise(x, layer_norm="head", layer_norm_eps=0.1), per_head)
    by_head = [gamma[h] * per_head[:, h] + beta[h] for h in range(3)]
    assert_close(reference.normalise(x, gamma, beta, "head", layer_norm_eps=0.1), torch.stack(by_head, 1))
    assert_close(reference.normalise(x, beta=beta[0]), x + beta[0])


@every_form
def test_packed_sequences_are_their_own(form):
    x = random_inputs(batch=1, group=2)
    earlier = random_inputs(batch=3, group=2, seqlen=6, seed=1)
    options = {"layer_norm": "token", "return_state": True, "eps": 0.0, "feature_map": "taylor"}
    _, initial = form(*earlier.qkv, *earlier.affine, **options)
    bounds = [2, 7, 7, 11]
    y, (kv, k) = form(*x.qkv, *x.affine, cu_seqlens=torch.tensor(bounds), initial_state=initial, **options)
    assert not y[:, :, :2].any()
    assert not y[:, :, 11:].any()
    assert (kv.shape[0], k.shape[0]) == (3, 3)
    for i, (first, last) in enumerate(itertools.pairwise(bounds)):
        own = tuple(t[i : i + 1] for t in initial)
        alone = form(*rows(x.qkv, first, last), *x.affine, initial_state=own, **options)
        assert_close((y[:, :, first:last], (kv[i : i + 1], k[i : i + 1])), alone)


@every_form
@every_map
def test_grouped_heads_share_a_kv_head(form, feature_map):
    q, k, v = random_inputs(group=3).qkv
    repeated = [x.repeat_interleave(3, 1) for x in (k, v)]
    expected = form(q, *repeated, feature_map=feature_map)
    assert_close(form(q, k, v, feature_map=feature_map), expected)


@every_form
@every_map
def test_no_tokens_no_batch_no_sequences(form, feature_map):
    x = random_inputs(group=2)
    options = {"feature_map": feature_map, "layer_norm": "token", "return_state": True}
    _, state = form(*x.qkv, *x.affine, **options)
    y, same = form(*rows(x.qkv, 0, 0), *x.affine, initial_state=state, **options)
    assert y.shape == (2, 4, 0, 7)
    assert_close(same, state, 0)
    features = reference.num_features(feature_map, 5)
    y, (kv, k) = form(*(t[:0] for t in x.qkv), *x.affine, **options)
    assert (y.shape, kv.shape, k.shape) == ((0, 4, 13, 7), (0, 2, features, 7), (0, 2, features))
    nothing = torch.zeros(1, dtype=torch.long)
    y, (kv, _) = form(*(t[:1] for t in x.qkv), *x.affine, cu_seqlens=nothing, **options)
    assert kv.shape == (0, 2, features, 7)
    assert y.shape == (1, 4, 13, 7)
    assert not y.any()


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sums_are_float32(form, dtype):
    """In low precision only the inputs and y are rounded: float32 in between, gamma and states too."""
    x = random_inputs(16, dtype=dtype)
    affine = [t.float() for t in x.affine]
    options = {"layer_norm": "token", "return_state": True}
    y, state = form(*x.qkv, *affine, **options)
    assert (y.dtype, *(t.dtype for t in state)) == (dtype, torch.float32, torch.float32)
    wide, wide_state = form(*(t.float() for t in x.qkv), *affine, **options)
    assert_close((y, state), (wide.to(dtype), wide_state), 0)


@every_form
def test_initial_state_is_not_modified(form):
    x = random_inputs()
    _, state = form(*x.qkv, return_state=True)
    before = [t.clone() for t in state]
    form(*x.qkv, initial_state=state, return_state=True)
    assert_close(state, before, 0)


@every_map
@every_norm
def test_gradcheck(feature_map, layer_norm):
    x = random_inputs(2, seqlen=4, batch=1, group=2)
    options = {"feature_map": feature_map, "layer_norm": layer_norm, "eps": 1e-2, "return_state": True}
    _, state = reference.quadratic(*x.qkv, *x.affine, **options)
    leaves = [t.clone().requires_grad_() for t in (*x.qkv, *x.affine, *state)]

    def outputs(*tensors):
        y, state = reference.quadratic(*tensors[:7], initial_state=tensors[7:], **options)
        return y, *state

    assert torch.autograd.gradcheck(outputs, leaves)


@every_form
@pytest.mark.parametrize(("name", "value"), [("feature_map", "cube"), ("layer_norm", "batch")])
def test_unknown_names_are_errors(form, name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        form(*random_inputs().qkv, **{name: value})


BAD_CALLS = {  # what of random_inputs(group=2) is changed, and the argument that the message must name
    "heads not in groups": (lambda x: {"q": x["q"][:, :1]}, "q"),
    "lengths": (lambda x: {"k": x["k"][:, :, :9]}, "k"),
    "batch": (lambda x: {"k": x["k"][:1]}, "k"),
    "feature dim": (lambda x: {"k": x["k"][..., :4]}, "k"),
    "device": (lambda x: {"k": x["k"].to("meta")}, "k"),
    "dtypes": (lambda x: {"k": x["k"].float()}, "k"),
    "int8": (lambda x: {name: x[name].to(torch.int8) for name in "qkv"}, "q"),
    "complex": (lambda x: {name: x[name].to(torch.complex64) for name in "qkv"}, "q"),
    "sparse": (lambda x: {"k": x["k"].to_sparse()}, "k"),
    "type": (lambda x: {"q": x["q"].tolist()}, "q"),
    "gamma": (lambda x: {"gamma_q": x["gamma_q"][:3]}, "gamma_q"),
    "beta": (lambda x: {"beta_k": x["beta_k"].long()}, "beta_k"),
    "eps negative": (lambda x: {"eps": -1}, "eps"),
    "eps nan": (lambda x: {"eps": float("nan")}, "eps"),
    "scale": (lambda x: {"scale": float("inf")}, "scale"),
    "scale type": (lambda x: {"scale": "1"}, "scale"),
    "layer_norm_eps": (lambda x: {"layer_norm_eps": -1e-5}, "layer_norm_eps"),
    "normalize": (lambda x: {"normalize": 1}, "normalize"),
    "feature_map": (lambda x: {"feature_map": ["outer"]}, "feature_map"),
    "layer_norm": (lambda x: {"layer_norm": 0}, "layer_norm"),
}
CALLS = {**FORMS, "attention_matrix": reference.attention_matrix}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("call", CALLS)
def test_bad_calls_name_the_argument(call, name):
    x = random_inputs(group=2)
    given = dict(
        zip(("q", "k", "v", "gamma_q", "beta_q", "gamma_k", "beta_k"), x.qkv + x.affine, strict=True)
    )
    change, argument = BAD_CALLS[name]
    given |= change(given)
    if call == "attention_matrix":
        del given["v"]
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: "):
        CALLS[call](**given)


@every_form
@pytest.mark.parametrize(
    "bounds",
    [[5, 2], [0, 7, 3, 13], [-1, 4], [0, 14], [3, 14, 13], [], [[0, 13]], [0.0, 13.0], [True, True]],
    ids=str,
)
@pytest.mark.parametrize("dtype", [None, torch.int32])
def test_bad_cu_seqlens(form, bounds, dtype):
    x = random_inputs(batch=1)
    bounds = torch.tensor(bounds)
    bounds = bounds.long() if bounds.numel() == 0 else bounds
    if dtype is not None and bounds.dtype == torch.int64:
        bounds = bounds.to(dtype)
    with pytest.raises((ValueError, TypeError), match=r"^cu_seqlens: "):
        form(*x.qkv, cu_seqlens=bounds)


@pytest.mark.parametrize("chunk", [0, -1, 4.0, "4", None, True])
def test_bad_chunk(chunk):
    with pytest.raises((ValueError, TypeError), match=r"^chunk: "):
        reference.chunked(*random_inputs().qkv, chunk=chunk)


def test_under_torch_func():
    """The checks read sizes and dtypes, which functorch's tensors have, and leave their memory alone."""
    x = random_inputs(2, seqlen=4, batch=3, group=2)
    q, k, v = x.qkv

    def call(q, k, v):
        return reference.quadratic(q, k, v, *x.affine, layer_norm="token")

    batched = torch.vmap(lambda *one: call(*(t.unsqueeze(0) for t in one)).squeeze(0))(q, k, v)
    assert_close(batched, call(q, k, v))
    _, tangent = torch.func.jvp(lambda q: call(q, k, v), (q,), (q,))
    _, pull = torch.func.vjp(lambda q: call(q, k, v), q)
    assert_close((tangent * tangent).sum(), (pull(tangent)[0] * q).sum(), 1e-10)
    for function in (reference.attention_matrix, reference.sim):
        matrices = torch.vmap(lambda q, k, f=function: f(q.unsqueeze(0), k.unsqueeze(0)).squeeze(0))(k, k)
        assert_close(matrices, function(k, k))
