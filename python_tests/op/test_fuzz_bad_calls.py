"""Every public function, every argument, every way to be wrong: refused by name, and nothing half-written.

A table counts the calls of every (function, argument, kind of fault). No cell is empty: it has calls, or a
reason why the fault does not exist there (bad_arguments.py, and beside the functions below). What is refused
without the argument's name, or not refused, stands in UNNAMED and ACCEPTED, each with its reason.
"""

from __future__ import annotations

import inspect
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bad_arguments import (
    KINDS,
    Argument,
    Values,
    affine,
    flag,
    freed,
    index,
    name,
    number,
    only,
    pick,
    size,
    tensor,
)

import rebased_cuda
from rebased_cuda import (
    GatedShortConvolution,
    ReBasedAttention,
    RebasedState,
    attention_matrix,
    compat,
    context_parallel,
    rebased_attention,
    rebased_attention_step,
    reference,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # the other layouts say that they are prototypes
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
REFUSALS = (ValueError, TypeError, RuntimeError)


@dataclass(frozen=True)
class Function:
    """A public function: how to call it, its good arguments, and of what sort each argument is."""

    call: Callable[..., Any]
    good: Callable[[random.Random], Values]
    arguments: dict[str, Argument]
    written: tuple[str, ...] = ()
    """Arguments that a call updates in place."""
    of: tuple[Any, ...] = ()
    """Whose signatures have the arguments, if not `call`'s."""
    left_out: tuple[str, ...] = ()
    """Parameters that are no arguments to be wrong: self, and **keywords without effect."""
    grad: tuple[bool, ...] = (True, False)


# ---- good arguments; a group of query heads is such that no other number of kv heads divides theirs ----


def _sizes(rng: random.Random) -> dict[str, int]:
    kv_heads, group = rng.choice(((3, 3), (4, 1), (4, 2), (5, 1)))
    draw = {"heads": kv_heads * group, "kv_heads": kv_heads, "feature_dim": rng.randint(3, 5)}
    return draw | {"head_dim": rng.randint(6, 8), "seqlen": rng.randint(7, 9), "batch": rng.randint(2, 3)}


def _affine(rng: random.Random, s: dict[str, int]) -> Values:
    def one(heads: int) -> torch.Tensor:
        d = s["feature_dim"]
        return torch.rand(rng.choice(((d,), (heads, d), (heads * d,))))

    heads = {"gamma_q": s["heads"], "beta_q": s["heads"], "gamma_k": s["kv_heads"], "beta_k": s["kv_heads"]}
    return {key: one(n) for key, n in heads.items()}


def _options(rng: random.Random) -> Values:
    return {
        "feature_map": "outer",
        "layer_norm": rng.choice((None, "token", "head")),
        "scale": rng.choice((None, 0.5)),
        "eps": 1e-3,
        "layer_norm_eps": 1e-5,
        "normalize": rng.choice((True, False)),
    }


def _state(s: dict[str, int], states: int, prefix: str) -> Values:
    features = s["feature_dim"] * (s["feature_dim"] + 1) // 2
    kv = torch.rand(states, s["kv_heads"], features, s["head_dim"])
    return {f"{prefix}.kv": kv, f"{prefix}.k": torch.rand(states, s["kv_heads"], features)}


def _packed(rng: random.Random) -> Values:
    s = _sizes(rng)
    q, k, v = (
        torch.rand(1, s[h], s["seqlen"], s[w])
        for h, w in (("heads", "feature_dim"), ("kv_heads", "feature_dim"), ("kv_heads", "head_dim"))
    )
    bounds = torch.tensor([0, 2, s["seqlen"]], dtype=rng.choice((torch.int32, torch.int64)))
    values = {"q": q, "k": k, "v": v, **_affine(rng, s), **_options(rng), **_state(s, 2, "initial_state")}
    return values | {"return_state": rng.choice((True, False)), "cu_seqlens": bounds}


def _step(rng: random.Random) -> Values:
    s = _sizes(rng)
    batch = s["batch"]
    q, k, v = (
        torch.rand(batch, s[h], s[w])
        for h, w in (("heads", "feature_dim"), ("kv_heads", "feature_dim"), ("kv_heads", "head_dim"))
    )
    values = {"q": q, "k": k, "v": v, **_state(s, batch + 1, "state"), **_affine(rng, s), **_options(rng)}
    slots = torch.tensor(rng.sample(range(batch + 1), batch))
    return values | {"state_index": slots.to(rng.choice((torch.int32, torch.int64)))}


def _reference_step(rng: random.Random) -> Values:
    values = _step(rng)
    del values["state_index"]
    batch = values["q"].shape[0]
    return {key: x[:batch] if key.startswith("state.") else x for key, x in values.items()}


def _without(make: Callable[[random.Random], Values], *names: str, **more: Any) -> Callable[..., Values]:
    def good(rng: random.Random) -> Values:
        return {key: x for key, x in make(rng).items() if key.split(".")[0] not in names} | more

    return good


def _bad_bounds(x: torch.Tensor, rng: random.Random, _: Values) -> torch.Tensor:
    last = int(x[-1])
    return torch.tensor(
        rng.choice(([-1, 2, last], [0, 5, 2], [0, 2, last + 1], [last, 0, last])), dtype=x.dtype
    )


def _bad_slots(x: torch.Tensor, rng: random.Random, values: Values) -> torch.Tensor:
    slots = values["state.kv" if "state.kv" in values else "state"].shape[0]
    x = x.clone()
    x[-1] = rng.choice((slots, -2, 1 << 20, int(x[0])))
    return x


def _in_memory_of(written: str) -> Callable[..., Any]:
    """Puts another argument into the memory of `written`, or makes that have one element twice."""

    def make(x: torch.Tensor, rng: random.Random, values: Values) -> Any:
        root = written.split(".")[0]
        others = [
            key
            for key, other in values.items()
            if key != written
            and isinstance(other, torch.Tensor)
            and other.dtype == x.dtype
            # with a stride, the last element of the smaller one is somewhere in the larger
            and (key.split(".")[0] == root or key in READ)
        ]
        other = rng.choice([*others, None])
        if other is None:
            return x[:1].expand(x.shape)
        size_of_other = values[other].numel()
        memory = torch.rand(x.numel() + size_of_other - 1)
        if rng.choice((True, False)):
            values[other] = memory[x.numel() - 1 :].view(values[other].shape)
            return memory[: x.numel()].view(x.shape)
        values[other] = memory[:size_of_other].view(values[other].shape)
        return memory[size_of_other - 1 :].view(x.shape)

    return make


READ = ("q", "k", "v", "gamma_q", "beta_q", "gamma_k", "beta_k", "u_t")
Q, K, V = tensor((0, 1, 2, 3)), tensor((0, 1, 2, 3)), tensor((0, 1, 2))
ROW_Q, ROW_K, ROW_V = tensor((0, 1, 2)), tensor((0, 1, 2)), tensor((0, 1))
AFFINE = {key: affine() for key in ("gamma_q", "beta_q", "gamma_k", "beta_k")}
OPTIONS = {
    "feature_map": name(),
    "layer_norm": name(optional=True),
    "scale": number(least=None, optional=True),
    "eps": number(),
    "layer_norm_eps": number(),
    "normalize": flag(),
}
NOT_A_STATE = (torch.zeros(2), [torch.zeros(2), torch.zeros(2)], (None, None), (torch.zeros(2),), "state", 3)
OF_PARTS = "its parts are arguments of their own"


def _state_arguments(
    prefix: str, written: bool, optional: bool, floats: bool = True, parts_optional: bool = False
) -> dict[str, Argument]:
    whole = pick(*NOT_A_STATE, *(() if optional else (None,)))
    made = {prefix: only(OF_PARTS, type=whole)}
    for part, dims in (("kv", (0, 1, 2, 3)), ("k", (0, 1, 2))):
        argument = tensor(dims, other_floats=floats, optional=parts_optional)
        if written:
            ways = {**argument.ways, "alias": _in_memory_of(f"{prefix}.{part}")}
            argument = Argument(ways, {k: r for k, r in argument.reasons.items() if k != "alias"})
        made[f"{prefix}.{part}"] = argument
    return made


PACKED = {
    **{"q": Q, "k": K, "v": V},
    **AFFINE,
    **OPTIONS,
    **_state_arguments("initial_state", written=False, optional=True),
    "return_state": flag(),
    "cu_seqlens": index(_bad_bounds, size=False),
}
ANY_DEVICE = {"device": "it is the only tensor, and any device will do"}


def _rows(dims: tuple[int, ...] = ()) -> Argument:
    """The one tensor of a function of features: (..., d) of any real dtype on any device."""
    scalar = lambda x, rng, _: x.flatten()[0]  # noqa: E731
    return tensor(dims, other_floats=False, ranks=scalar).but(**ANY_DEVICE)


def _plain(sizes: tuple[int, ...], **more: Any) -> Callable[[random.Random], Values]:
    return lambda rng: {key: torch.rand(sizes) if x is torch.rand else x for key, x in more.items()}


def _sim(rng: random.Random) -> Values:
    return {"q": torch.rand(3, 5, 4), "k": torch.rand(3, 6, 4), "feature_map": "taylor", "scale": 0.5}


def _normalise(rng: random.Random) -> Values:
    parameters = {"gamma": torch.rand(3, 4), "beta": torch.rand(3, 4)}
    return {"x": torch.rand(2, 3, 5, 4), **parameters, "layer_norm": "head", "layer_norm_eps": 1e-5}


# ---- other packages' calls ----


def _fla(rng: random.Random) -> Values:
    s = _sizes(rng) | {"batch": 2}
    q, k, v = (
        torch.rand(2, s["seqlen"], s["kv_heads"], s[w]) for w in ("feature_dim", "feature_dim", "head_dim")
    )
    return {"q": q, "k": k, "v": v}


def _parallel_rebased(rng: random.Random) -> Values:
    flags = {key: rng.choice((True, False)) for key in ("use_scale", "use_normalize", "return_both")}
    return {**_fla(rng), "eps": 1e-5, **flags, "head_first": False}


def _parallel_based(rng: random.Random) -> Values:
    return {**_fla(rng), "scale": 0.5, "use_norm": rng.choice((True, False)), "head_first": False}


def _chunk_linear_attn(rng: random.Random) -> Values:
    values = {key: x[:1] for key, x in _fla(rng).items()}
    heads, d, dv = values["q"].shape[2], values["q"].shape[3], values["v"].shape[3]
    states = {"initial_state.kv": torch.rand(2, heads, d, dv), "initial_state.k": torch.rand(2, 1, heads, d)}
    bounds = torch.tensor([0, 2, values["q"].shape[1]])
    return {
        **values,
        "scale": 0.5,
        **states,
        "output_final_state": True,
        "normalize": True,
        "cu_seqlens": bounds,
    }


def _mixer(rng: random.Random) -> Values:
    sizes = {"d_model": 12, "l_max": 2048, "feature_dim": 4, "num_key_value_heads": 3, "num_heads": 3}
    named = {"feature_name": "taylor_exp", "eps": 1e-12, "causal": True, "mode": "parallel"}
    return {**sizes, **named, "use_beta": True, "use_gamma": True, "normalize": True}


# ---- the layers ----

WIDTH = 12


def _layer() -> ReBasedAttention:
    return ReBasedAttention(WIDTH, 4, 3, 2)


def _layer_arguments(rng: random.Random) -> Values:
    sizes = {"hidden_size": WIDTH, "num_heads": 4, "feature_dim": 3, "num_kv_heads": 2, "head_dim": 5}
    options = {key: x for key, x in _options(rng).items() if key != "normalize"}
    return {**sizes, **options, "use_gamma": True, "use_beta": rng.choice((True, False))}


def _masked(key: str) -> Callable[[random.Random], Values]:
    return lambda rng: {key: torch.rand(2, 5, WIDTH), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 2)}


def _layer_state(states: int) -> Values:
    return _state({"kv_heads": 2, "feature_dim": 3, "head_dim": 6}, states, "state")


def _convolution_state(states: int) -> Values:
    return {"state": torch.rand(states, WIDTH, 2)}


def _going_on(key: str, state: Callable[[int], Values]) -> Callable[[random.Random], Values]:
    """A masked batch after its states."""
    return lambda rng: {**_masked(key)(rng), **state(2)}


def _packed_rows(key: str, state: Callable[[int], Values]) -> Callable[[random.Random], Values]:
    return lambda rng: {
        key: torch.rand(1, 7, WIDTH),
        "cu_seqlens": torch.tensor([0, 3, 7], dtype=rng.choice((torch.int32, torch.int64))),
        **state(2),
    }


def _in_pool(key: str, state: Callable[[int], Values]) -> Callable[[random.Random], Values]:
    """Two sequences, or one token of each, in slots of a pool of three."""

    def good(rng: random.Random) -> Values:
        x = torch.rand(2, WIDTH) if key.endswith("_t") else torch.rand(2, 5, WIDTH)
        slots = torch.tensor(rng.sample(range(3), 2))
        return {key: x, **state(3), "state_index": slots.to(rng.choice((torch.int32, torch.int64)))}

    return good


BOUNDS = {"cu_seqlens": index(_bad_bounds, size=False)}
SLOTS = {"state_index": index(_bad_slots, size=True)}
LAYER_STATE = _state_arguments("state", written=False, optional=True)
LAYER_POOL = {**_state_arguments("state", written=True, optional=False), **SLOTS}
CONVOLUTION_STATE = {"state": tensor((0, 1, 2), optional=True)}
CONVOLUTION_POOL = {
    "state": Argument(
        {**tensor((1, 2)).ways, "alias": _in_memory_of("state")},
        dict.fromkeys(("range", "nan", "inf"), "any number may stand in a tensor"),
    ),
    **SLOTS,
}
LAYER_INPUT = tensor((2,))
MASK = Argument(
    {
        **index(pick(), size=True).ways,
        "dtype": lambda x, rng, _: x.to(rng.choice((torch.float32, torch.complex64, torch.bfloat16))),
        "rank": lambda x, rng, _: rng.choice((x.unsqueeze(0), x[0])),
        "size + 1": lambda x, rng, _: torch.ones(
            [n + i for n, i in zip(x.shape, rng.choice(((0, 1), (1, 0))), strict=True)]
        ).long(),
        "size - 1": lambda x, rng, _: rng.choice((x[:-1], x[:, :-1])),
    },
    index(pick(), size=True).reasons,
).but(range="every integer is a token or padding")


# ---- a sequence over processes: here there is one ----


def _group(values: Values) -> Values:
    return {**values, "group": None, "shard_lengths": [values["k"].shape[2]]}


GROUP = {
    "group": only("it is no tensor", type=pick("world", 3, 1.5, [0], object)),
    "shard_lengths": only(
        "it is no tensor",
        type=pick("8", 3, 1.5, object, ["8"], [8.0], [True]),
        range=lambda good, rng, _: rng.choice(([good[0] + 1], [*good, 0], [], [-1])),
    ),
}
NOT_SENT = ("q", "gamma_q", "beta_q", "scale", "eps", "normalize", "initial_state")


# ---- all of them ----


def _values_of(arguments: dict[str, Argument], *names: str) -> dict[str, Argument]:
    return {key: x for key, x in arguments.items() if key.split(".")[0] not in names}


UNUSED = only("without effect, as in the original")
STATE_PARTS = {
    part: only("a state is what zeros, prefill or the op made", empty=freed) for part in ("kv", "k")
}
BY_KEYWORD = ("affine", "options")

LINEAR_ATTN: dict[str, Argument] = {
    **{"q": Q, "k": K, "v": V, "scale": number(least=None, optional=True)},
    **_state_arguments("initial_state", written=False, optional=True, floats=False, parts_optional=True),
    "initial_state": only(OF_PARTS, type=pick([None, None], "x", (None,), (None, 1.0), 3, object)),
    **{"output_final_state": flag(), "normalize": flag()},
    "cu_seqlens": index(_bad_bounds, size=False),
}

FUNCTIONS: dict[str, Function] = {
    "rebased_attention": Function(rebased_attention, _packed, PACKED),
    "rebased_attention_step": Function(
        rebased_attention_step,
        _step,
        {
            **{"q": ROW_Q, "k": ROW_K, "v": ROW_V},
            **_state_arguments("state", written=True, optional=False),
            **AFFINE,
            **OPTIONS,
            "state_index": index(_bad_slots, size=True),
        },
        written=("state.kv", "state.k"),
    ),
    "attention_matrix": Function(
        attention_matrix,
        _without(_packed, "v", "initial_state", "return_state", "cu_seqlens"),
        _values_of(PACKED, "v", "initial_state", "return_state", "cu_seqlens"),
    ),
    "RebasedState.zeros": Function(
        RebasedState.zeros,
        lambda rng: {
            **{"batch": 2, "kv_heads": 3, "feature_dim": 4, "head_dim": 5},
            **{"feature_map": "taylor", "dtype": torch.float32, "device": "cpu"},
        },
        {
            **{"batch": size(0), "kv_heads": size(1)},
            **{"feature_dim": size(1, 128), "head_dim": size(1, 256), "feature_map": name()},
            "dtype": only(
                "it is no tensor", type=pick("float32", None, 3), range=pick(torch.float16, torch.int64)
            ),
            "device": only(
                "it is no tensor", type=pick(1.5, ["cpu"], True), range=pick("nowhere", -7, "cpu:x")
            ),
        },
    ),
    "RebasedState.index_select": Function(
        lambda index, **state: RebasedState(**state).index_select(index),
        lambda rng: {
            "index": torch.tensor([1, 1, 0]),
            "kv": torch.rand(2, 3, 4, 5),
            "k": torch.rand(2, 3, 4),
        },
        {
            "index": index(lambda x, rng, _: torch.tensor(rng.choice(([2], [-1, 0], [0, 99]))), size=False),
            **STATE_PARTS,
        },
        of=(RebasedState.index_select,),
        left_out=("self",),
    ),
    "RebasedState.repeat_interleave": Function(
        lambda repeats, **state: RebasedState(**state).repeat_interleave(repeats),
        lambda rng: {"repeats": rng.randint(0, 3), "kv": torch.rand(2, 3, 4, 5), "k": torch.rand(2, 3, 4)},
        {"repeats": size(0), **STATE_PARTS},
        of=(RebasedState.repeat_interleave,),
        left_out=("self",),
    ),
    "RebasedState.to": Function(
        lambda dtype, device, kv, k: RebasedState(kv, k).to(dtype=dtype, device=device),
        lambda rng: {
            "dtype": torch.float64,
            "device": "cpu",
            "kv": torch.rand(2, 3, 4, 5),
            "k": torch.rand(2, 3, 4),
        },
        {
            "dtype": only("it is no tensor", type=pick("float32", 3), range=pick(torch.float16, torch.int64)),
            "device": only("it is no tensor", type=pick(1.5, ["cpu"]), range=pick("nowhere", "cpu:x")),
            **STATE_PARTS,
        },
        of=(RebasedState.to,),
        left_out=("self", "args", "kwargs"),
    ),
    "RebasedState.clone": Function(
        lambda **state: RebasedState(**state).clone(),
        lambda rng: {"kv": torch.rand(2, 3, 4, 5), "k": torch.rand(2, 3, 4)},
        STATE_PARTS,
        of=(RebasedState.clone,),
        left_out=("self",),
    ),
    "reference.quadratic": Function(reference.quadratic, _packed, PACKED, of=(rebased_attention,)),
    "reference.chunked": Function(
        reference.chunked,
        lambda rng: {**_packed(rng), "chunk": rng.randint(1, 9)},
        {**PACKED, "chunk": size(1)},
        of=(rebased_attention, reference.chunked),
        left_out=BY_KEYWORD,
    ),
    "reference.recurrent": Function(reference.recurrent, _packed, PACKED, of=(rebased_attention,)),
    "reference.step": Function(
        reference.step,
        _reference_step,
        {
            **{"q": ROW_Q, "k": ROW_K, "v": ROW_V},
            **_state_arguments("state", written=False, optional=False),
            **AFFINE,
            **OPTIONS,
        },
        of=(rebased_attention_step, reference.step),
        left_out=("state_index", *BY_KEYWORD),
    ),
    "reference.normalise": Function(
        reference.normalise,
        _normalise,
        {
            "x": tensor((1,), other_floats=False).but(
                size_plus_1="gamma and beta are held against it",
                size_minus_1="gamma and beta are held against it",
            ),
            **{"gamma": affine(), "beta": affine(), "layer_norm": name(optional=True)},
            "layer_norm_eps": number(),
        },
    ),
    "reference.num_features": Function(
        reference.num_features,
        lambda rng: {"feature_map": "outer", "feature_dim": 5},
        {"feature_map": name(), "feature_dim": size(1)},
    ),
    "reference.circulant": Function(reference.circulant, _plain((3, 4), x=torch.rand), {"x": _rows()}),
    "reference.key_features": Function(
        reference.key_features,
        _plain((3, 4), k=torch.rand, feature_map="elu"),
        {"k": _rows(), "feature_map": name()},
    ),
    "reference.query_features": Function(
        reference.query_features,
        _plain((3, 4), q=torch.rand, feature_map="outer", scale=None),
        {"q": _rows(), "feature_map": name(), "scale": number(least=None, optional=True)},
    ),
    "reference.sim": Function(
        reference.sim,
        _sim,
        {
            **{key: tensor((0, 2), ranks=lambda x, rng, _: x[0, 0]) for key in ("q", "k")},
            "feature_map": name(),
            "scale": number(least=None, optional=True),
        },
    ),
    "compat.parallel_rebased": Function(
        compat.parallel_rebased,
        _parallel_rebased,
        {
            **{"q": Q, "k": K, "v": V},
            "eps": number(),
            **{key: flag() for key in ("use_scale", "use_normalize", "return_both", "head_first")},
        },
    ),
    **{
        f"compat.{function.__name__}": Function(
            function,
            _parallel_based,
            {
                **{"q": Q, "k": K, "v": V, "scale": number(least=None, optional=True)},
                **{key: flag() for key in ("use_norm", "head_first")},
            },
        )
        for function in (compat.parallel_based, compat.fused_chunk_based)
    },
    "compat.chunk_linear_attn": Function(compat.chunk_linear_attn, _chunk_linear_attn, LINEAR_ATTN),
    "compat.fused_chunk_linear_attn": Function(
        compat.fused_chunk_linear_attn, _chunk_linear_attn, LINEAR_ATTN
    ),
    "compat.fused_recurrent_linear_attn": Function(
        compat.fused_recurrent_linear_attn,
        lambda rng: {**_chunk_linear_attn(rng), "reverse": False},
        {**LINEAR_ATTN, "reverse": flag()},
    ),
    "compat.ReBased": Function(
        compat.ReBased,
        _mixer,
        {
            **{"d_model": size(1), "l_max": UNUSED, "feature_dim": size(1, 128)},
            **{"num_key_value_heads": size(1), "num_heads": size(1), "feature_name": UNUSED},
            **{"eps": number(), "causal": flag(), "mode": name()},
            **{"use_beta": flag(), "use_gamma": flag(), "normalize": flag()},
        },
        left_out=("factory",),  # keywords by name, which test_compat.py tries
    ),
    "compat.ReBased.forward": Function(
        lambda **values: compat.ReBased(WIDTH, 8, 4, 3, 3)(**values),
        _masked("hidden_states"),
        {"hidden_states": LAYER_INPUT, "attention_mask": MASK},
        of=(compat.ReBased.forward,),
        left_out=("self", "others"),
    ),
    "ReBasedAttention": Function(
        ReBasedAttention,
        _layer_arguments,
        {
            **{"hidden_size": size(1), "num_heads": size(1), "feature_dim": size(1, 128)},
            **{"num_kv_heads": size(1, 4, optional=True), "head_dim": size(1, 256, optional=True)},
            **_values_of(OPTIONS, "normalize"),
            **{"use_gamma": flag(), "use_beta": flag()},
        },
    ),
    "ReBasedAttention.forward": Function(
        lambda **values: _layer()(**values),
        _going_on("x", _layer_state),
        {"x": LAYER_INPUT, "attention_mask": MASK, **LAYER_STATE},
        of=(ReBasedAttention.forward,),
        left_out=("self", "cu_seqlens"),
    ),
    "ReBasedAttention.forward, packed": Function(
        lambda **values: _layer()(**values),
        _packed_rows("x", _layer_state),
        {"x": LAYER_INPUT, **BOUNDS, **LAYER_STATE},
        of=(ReBasedAttention.forward,),
        left_out=("self", "attention_mask"),
    ),
    "ReBasedAttention.prefill": Function(
        lambda **values: _layer().prefill(**values),
        _going_on("x", _layer_state),
        {"x": LAYER_INPUT, "attention_mask": MASK, **LAYER_STATE},
        of=(ReBasedAttention.prefill,),
        left_out=("self", "cu_seqlens", "state_index"),
    ),
    "ReBasedAttention.prefill, packed": Function(
        lambda **values: _layer().prefill(**values),
        _packed_rows("x", _layer_state),
        {"x": LAYER_INPUT, **BOUNDS, **LAYER_STATE},
        of=(ReBasedAttention.prefill,),
        left_out=("self", "attention_mask", "state_index"),
    ),
    "ReBasedAttention.prefill, pool": Function(
        lambda **values: _layer().prefill(**values),
        _in_pool("x", _layer_state),
        {"x": LAYER_INPUT, **LAYER_POOL},
        written=("state.kv", "state.k"),
        of=(ReBasedAttention.prefill,),
        grad=(False,),
        left_out=("self", "attention_mask", "cu_seqlens"),
    ),
    "ReBasedAttention.step": Function(
        lambda **values: _layer().step(**values),
        _in_pool("x_t", _layer_state),
        {"x_t": tensor((1,)), **LAYER_POOL},
        written=("state.kv", "state.k"),
        of=(ReBasedAttention.step,),
        grad=(False,),
        left_out=("self",),
    ),
    "ReBasedAttention.attention_matrix": Function(
        lambda x: _layer().attention_matrix(x),
        _without(_masked("x"), "attention_mask"),
        {"x": LAYER_INPUT},
        of=(ReBasedAttention.attention_matrix,),
        left_out=("self",),
    ),
    "GatedShortConvolution": Function(
        GatedShortConvolution,
        lambda rng: {"hidden_size": 4, "kernel_size": 3},
        {"hidden_size": size(1), "kernel_size": size(1)},
    ),
    "GatedShortConvolution.forward": Function(
        lambda **values: GatedShortConvolution(WIDTH)(**values),
        _going_on("u", _convolution_state),
        {"u": LAYER_INPUT, "attention_mask": MASK, **CONVOLUTION_STATE},
        of=(GatedShortConvolution.forward,),
        left_out=("self", "cu_seqlens"),
    ),
    "GatedShortConvolution.forward, packed": Function(
        lambda **values: GatedShortConvolution(WIDTH)(**values),
        _packed_rows("u", _convolution_state),
        {"u": LAYER_INPUT, **BOUNDS, **CONVOLUTION_STATE},
        of=(GatedShortConvolution.forward,),
        left_out=("self", "attention_mask"),
    ),
    "GatedShortConvolution.prefill": Function(
        lambda **values: GatedShortConvolution(WIDTH).prefill(**values),
        _going_on("u", _convolution_state),
        {"u": LAYER_INPUT, "attention_mask": MASK, **CONVOLUTION_STATE},
        of=(GatedShortConvolution.prefill,),
        left_out=("self", "cu_seqlens", "state_index"),
    ),
    "GatedShortConvolution.prefill, packed": Function(
        lambda **values: GatedShortConvolution(WIDTH).prefill(**values),
        _packed_rows("u", _convolution_state),
        {"u": LAYER_INPUT, **BOUNDS, **CONVOLUTION_STATE},
        of=(GatedShortConvolution.prefill,),
        left_out=("self", "attention_mask", "state_index"),
    ),
    "GatedShortConvolution.prefill, pool": Function(
        lambda **values: GatedShortConvolution(WIDTH).prefill(**values),
        _in_pool("u", _convolution_state),
        {"u": LAYER_INPUT, **CONVOLUTION_POOL},
        written=("state",),
        of=(GatedShortConvolution.prefill,),
        grad=(False,),
        left_out=("self", "attention_mask", "cu_seqlens"),
    ),
    "GatedShortConvolution.step": Function(
        lambda **values: GatedShortConvolution(WIDTH).step(**values),
        _in_pool("u_t", _convolution_state),
        {"u_t": tensor((1,)), **CONVOLUTION_POOL},
        written=("state",),
        of=(GatedShortConvolution.step,),
        grad=(False,),
        left_out=("self",),
    ),
}
WITH_GROUP: dict[str, Function] = {
    "context_parallel_rebased_attention": Function(
        context_parallel.context_parallel_rebased_attention,
        lambda rng: {**_group(_packed(rng)), "exchange": None},
        {
            **PACKED,
            **GROUP,
            "exchange": only("it is what begin_exchange returned", type=pick("x", 3, object)),
        },
    ),
    "begin_exchange": Function(
        context_parallel.begin_exchange,
        _without(lambda rng: _group(_packed(rng)), *NOT_SENT, return_state=True),
        {**_values_of(PACKED, *NOT_SENT), "k": V, **GROUP},  # gamma_k is held against k's width
    ),
    "context_parallelize": Function(
        context_parallel.context_parallelize,
        lambda rng: {"module": GatedShortConvolution(WIDTH), "group": None},
        {
            "module": only("any module will do", type=pick(None, "x", 3, [GatedShortConvolution(4)])),
            "group": GROUP["group"],
        },
    ),
}
NOT_FUZZED = {
    "build_info": "it has no arguments",
    "RebasedState": "its constructor takes what the op made; its methods are here",
    "StateExchange": "begin_exchange makes it",
    "explain": "it checks a call as rebased_attention does; test_explain.py has what it takes beside",
    "DeviceLimits": "a record, which explain looks at; test_explain.py has wrong ones",
}
FUNCTIONS |= WITH_GROUP

Case = tuple[str, str, str]  # function, argument, kind

UNNAMED: dict[Case, str] = {
    ("RebasedState.to", "dtype", "type"): "torch.Tensor.to refuses it, and lists what it was given",
    ("RebasedState.to", "device", "type"): "torch.Tensor.to refuses it, and lists what it was given",
    ("RebasedState.to", "device", "range"): "torch.Tensor.to refuses it, and quotes it",
}
"""Refused by an error that does not begin with an argument's name and say this one's."""
ACCEPTED: dict[Case, str] = {}
"""Not refused."""


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _assembled(values: Values) -> Values:
    """Parts of states put together."""
    call: Values = {}
    for key, x in values.items():
        root, _, part = key.partition(".")
        if not part:
            call[root] = x
        elif root not in values:  # else the whole is wrong
            call.setdefault(root, {})[part] = x
    for key, x in call.items():
        if isinstance(x, dict) and set(x) == {"kv", "k"}:
            call[key] = RebasedState(**x)
    return call


def _snapshot(function: Function, values: Values) -> dict[str, torch.Tensor]:
    """Copies of what the call would write, as far as it can be read."""
    tensors = {key: values[key] for key in function.written if isinstance(values.get(key), torch.Tensor)}

    def readable(x: torch.Tensor) -> bool:
        if x.is_nested or x.is_quantized or x.layout != torch.strided or x.device.type != "cpu":
            return False
        last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        held = x.untyped_storage().nbytes()
        return (x.storage_offset() + last + 1) * x.element_size() <= held

    return {key: x.clone() for key, x in tensors.items() if readable(x)}


def _fault(case: Case, function: Function, draw: int, unnamed: set[Case]) -> str | None:
    """What is wrong with one bad call, or None where it is refused as it should be."""
    _, argument, kind = case
    for grad in function.grad:
        rng = random.Random(f"{case} {draw}")
        values = function.good(rng)
        bad = function.arguments[argument].ways[kind](values.get(argument), rng, values)
        values[argument] = bad
        before = _snapshot(function, values)
        try:
            with torch.set_grad_enabled(grad):
                function.call(**_assembled(values))
        except REFUSALS as error:
            message = str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        else:
            if case in ACCEPTED:
                continue
            given = f"{tuple(bad.shape)} {bad.dtype}" if isinstance(bad, torch.Tensor) else repr(bad)
            return f"accepted {given}"
        if case in ACCEPTED:
            return "is in ACCEPTED, and refused"
        for key, x in before.items():
            if not torch.equal(values[key], x):
                return f"{key} was changed before: {message}"
        begins = re.match(r"(rebased_cuda: )?([\w]+)(\.\w+)?: ", message)
        known = {key.split(".")[0] for key in function.arguments}
        says = re.search(rf"(?<![\w.]){re.escape(argument.split('.')[0])}(?!\w)", message)
        if begins is None or begins[2] not in known or says is None:
            unnamed.add(case)
            if case not in UNNAMED:
                return f"not named: {message}"
    return None


@pytest.mark.parametrize("draws", [3, pytest.param(30, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("title", FUNCTIONS)
def test_bad_calls(title, draws, request):
    if title in WITH_GROUP:
        request.getfixturevalue("process_group")
    function = FUNCTIONS[title]
    for grad in function.grad:  # what is fuzzed is right but for one argument
        for draw in range(3):
            with torch.set_grad_enabled(grad):
                function.call(**_assembled(function.good(random.Random(draw))))
    calls: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    unnamed: set[Case] = set()
    for argument, given in function.arguments.items():
        for kind in given.ways:
            for draw in range(draws):
                fault = _fault((title, argument, kind), function, draw, unnamed)
                calls[argument, kind] += 1
                if fault is not None:
                    faults.append(f"{argument}, {kind}: {fault}")
    assert not faults, "\n".join(faults)
    empty = [
        (argument, kind)
        for argument, given in function.arguments.items()
        for kind in KINDS
        if not calls[argument, kind] and kind not in given.reasons
    ]
    assert not empty
    assert unnamed == {case for case in UNNAMED if case[0] == title}  # no exception outlives its reason


def test_every_cell_has_a_way_or_a_reason():
    """And not both; a fault that is listed as an exception is one that is tried."""
    for title, function in FUNCTIONS.items():
        for argument, given in function.arguments.items():
            assert set(given.ways) | set(given.reasons) == set(KINDS), (title, argument)
            assert not set(given.ways) & set(given.reasons), (title, argument)
    for title, argument, kind in (*UNNAMED, *ACCEPTED):
        assert kind in FUNCTIONS[title].arguments[argument].ways


def test_every_public_function_and_argument_is_here():
    public = [*rebased_cuda.__all__, *context_parallel.__all__]
    public += [f"compat.{key}" for key in compat.__all__]
    public += [
        f"reference.{key}"
        for key, x in vars(reference).items()
        if inspect.isfunction(x) and x.__module__ == reference.__name__ and not key.startswith("_")
    ]
    public.remove("attention_matrix")
    for key in public:
        assert key in FUNCTIONS or key in NOT_FUZZED or key == "reference.attention_matrix", key
    for layer in (ReBasedAttention, GatedShortConvolution, RebasedState):
        methods = {key for key, x in vars(layer).items() if inspect.isfunction(x) and not key.startswith("_")}
        for key in methods - {"extra_repr", "detach"}:  # of these one takes nothing, and one reads nothing
            assert f"{layer.__name__}.{key}" in FUNCTIONS, key
    for title, function in FUNCTIONS.items():
        roots = {key.split(".")[0] for key in function.arguments}
        for signature in map(inspect.signature, function.of or (function.call,)):
            assert set(signature.parameters) - set(function.left_out) <= roots, title
