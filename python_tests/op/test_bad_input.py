"""Every argument, wrong in every way: the error names it, and nothing in place is touched."""

import contextlib
import copy
import gc
import pickle
import re
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch

from rebased_cuda import RebasedState, rebased_attention, rebased_attention_step

Q, K, V = (2, 4, 6, 5), (2, 2, 6, 5), (2, 2, 6, 7)


def arguments(**changes):
    base = {
        "q": torch.randn(Q),
        "k": torch.randn(K),
        "v": torch.randn(V),
        "gamma_q": torch.randn(4, 5),
        "beta_k": torch.randn(5),
    }
    return {**base, **changes}


BAD = {
    "q type": ({"q": [1.0]}, TypeError, "q:"),
    "q dims": ({"q": torch.randn(2, 6, 5)}, ValueError, "q:"),
    "q dtype": ({"q": torch.ones(Q, dtype=torch.int32)}, TypeError, "q:"),
    "q feature dim": ({"q": torch.randn(2, 4, 6, 129), "k": torch.randn(2, 2, 6, 129)}, ValueError, "q:"),
    "q no features": ({"q": torch.randn(2, 4, 6, 0), "k": torch.randn(2, 2, 6, 0)}, ValueError, "q:"),
    "q heads": ({"q": torch.randn(2, 3, 6, 5)}, ValueError, "q:"),
    "q complex": ({"q": torch.randn(Q, dtype=torch.complex64)}, TypeError, "q:"),
    "q layout": ({"q": torch.zeros(Q).to_sparse()}, ValueError, "q:"),
    "scale huge": ({"scale": 10**400}, ValueError, "scale:"),
    "k heads": ({"k": torch.randn(2, 0, 6, 5)}, ValueError, "k:"),
    "k type": ({"k": None}, TypeError, "k:"),
    "k dims": ({"k": torch.randn(2, 6, 5)}, ValueError, "k:"),
    "k dtype": ({"k": torch.randn(K).double()}, TypeError, "k:"),
    "k batch": ({"k": torch.randn(3, 2, 6, 5)}, ValueError, "k:"),
    "k seqlen": ({"k": torch.randn(2, 2, 7, 5)}, ValueError, "k:"),
    "k feature dim": ({"k": torch.randn(2, 2, 6, 4)}, ValueError, "k:"),
    "k device": ({"k": torch.empty(K, device="meta")}, ValueError, "k:"),
    "v device": ({"v": torch.empty(V, device="meta")}, ValueError, "v:"),
    "v type": ({"v": 3}, TypeError, "v:"),
    "v dims": ({"v": torch.randn(2, 2, 6, 7, 1)}, ValueError, "v:"),
    "v dtype": ({"v": torch.randn(V).half()}, TypeError, "v:"),
    "v heads": ({"v": torch.randn(2, 4, 6, 7)}, ValueError, "v:"),
    "v seqlen": ({"v": torch.randn(2, 2, 5, 7)}, ValueError, "v:"),
    "v head dim": ({"v": torch.randn(2, 2, 6, 257)}, ValueError, "v:"),
    "gamma_q device": ({"gamma_q": torch.empty(5, device="meta")}, ValueError, "gamma_q:"),
    "gamma_q type": ({"gamma_q": 1.0}, TypeError, "gamma_q:"),
    "gamma_q shape": ({"gamma_q": torch.randn(2, 5)}, ValueError, "gamma_q:"),
    "gamma_k shape": ({"gamma_k": torch.randn(4, 5)}, ValueError, "gamma_k:"),
    "gamma_k dtype": ({"gamma_k": torch.ones(5, dtype=torch.int64)}, TypeError, "gamma_k:"),
    "beta_q shape": ({"beta_q": torch.randn(4)}, ValueError, "beta_q:"),
    "beta_k device": ({"beta_k": torch.empty(5, device="meta")}, ValueError, "beta_k:"),
    "feature_map": ({"feature_map": "relu"}, ValueError, "feature_map:"),
    "layer_norm": ({"layer_norm": "batch"}, ValueError, "layer_norm:"),
    "scale type": ({"scale": "1"}, TypeError, "scale:"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale:"),
    "eps negative": ({"eps": -1e-6}, ValueError, "eps:"),
    "eps type": ({"eps": None}, TypeError, "eps:"),
    "layer_norm_eps infinite": ({"layer_norm_eps": float("inf")}, ValueError, "layer_norm_eps:"),
    "normalize": ({"normalize": 1}, TypeError, "normalize:"),
}
SHARED = {name: case for name, case in BAD.items() if "seqlen" not in name}

BAD_FORWARD = {
    "state type": ({"initial_state": torch.zeros(3)}, TypeError, "initial_state:"),
    "state features": ({"initial_state": RebasedState.zeros(2, 2, 6, 7)}, ValueError, "initial_state.kv:"),
    "state batch": ({"initial_state": RebasedState.zeros(3, 2, 5, 7)}, ValueError, "initial_state.kv:"),
    "state dtype": (
        {"initial_state": RebasedState.zeros(2, 2, 5, 7, dtype=torch.float64)},
        TypeError,
        "initial_state.kv:",
    ),
    "state k": (
        {"initial_state": RebasedState(torch.zeros(2, 2, 15, 7), torch.zeros(2, 2, 14))},
        ValueError,
        "initial_state.k:",
    ),
    "state k device": (
        {"initial_state": RebasedState(torch.zeros(2, 2, 15, 7), torch.zeros(2, 2, 15, device="meta"))},
        ValueError,
        "initial_state.k:",
    ),
    "state of nothing": ({"initial_state": (None, None)}, TypeError, "initial_state:"),
    "return_state": ({"return_state": "yes"}, TypeError, "return_state:"),
    "cu_seqlens type": ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens:"),
    "cu_seqlens dtype": ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens:"),
    "cu_seqlens dims": ({"cu_seqlens": torch.tensor([[0, 6]])}, ValueError, "cu_seqlens:"),
    "cu_seqlens batch": ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "q:"),
}

ONE = {"q": torch.randn(1, 4, 6, 5), "k": torch.randn(1, 2, 6, 5), "v": torch.randn(1, 2, 6, 7)}
BAD_PACKED = {
    "empty": ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, "cu_seqlens:"),
    "device": ({"cu_seqlens": torch.tensor([0, 6], device="meta")}, "cu_seqlens:"),
    "past the end": ({"cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens:"),
    "negative": ({"cu_seqlens": torch.tensor([-1, 6])}, "cu_seqlens:"),
    "decreasing": ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "cu_seqlens:"),
    "states": (
        {"cu_seqlens": torch.tensor([0, 3, 6]), "initial_state": RebasedState.zeros(1, 2, 5, 7)},
        "initial_state.kv:",
    ),
}


def _names(words: str) -> str:
    return rf"^(rebased_cuda: )?{re.escape(words)}"


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", [*BAD, *BAD_FORWARD])
def test_forward_names_the_argument(name, grad):
    changes, error, words = {**BAD, **BAD_FORWARD}[name]
    with torch.set_grad_enabled(grad), pytest.raises(error, match=_names(words)):
        rebased_attention(**arguments(**changes))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", BAD_PACKED)
def test_packed_sequences_on_the_cpu(name, grad):
    changes, words = BAD_PACKED[name]
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=_names(words)):
        rebased_attention(**ONE, **changes)


def step_arguments(**changes):
    # one row of each rank-4 tensor
    changes = {
        name: x[:, :, 0] if isinstance(x, torch.Tensor) and x.dim() == 4 else x for name, x in changes.items()
    }
    base = {name: x[:, :, 0] if x.dim() == 4 else x for name, x in arguments().items()}
    return {**base, **changes}


@pytest.mark.parametrize("grad", [True, False])  # where there are no gradients the operator looks first
@pytest.mark.parametrize("name", SHARED)
def test_step_names_the_argument_and_leaves_the_state(name, grad):
    changes, error, words = SHARED[name]
    state = RebasedState.zeros(2, 2, 5, 7)
    if name in ("q dims", "k dims"):
        changes = {key: x[:, 0] for key, x in changes.items()}
    with torch.set_grad_enabled(grad), pytest.raises(error, match=_names(words)):
        rebased_attention_step(**step_arguments(**changes), state=state)
    assert not state.kv.any()
    assert not state.k.any()


BAD_STEP = {
    "state type": ({"state": None}, TypeError, "state:"),
    "state features": ({"state": RebasedState.zeros(2, 2, 4, 7)}, ValueError, "state.kv:"),
    "state slots": ({"state": RebasedState.zeros(3, 2, 5, 7)}, ValueError, "state.kv:"),
    "state dtype": ({"state": RebasedState.zeros(2, 2, 5, 7, dtype=torch.float64)}, TypeError, "state.kv:"),
    "state strides": (
        {"state": RebasedState(torch.zeros(2, 2, 7, 15).transpose(2, 3), torch.zeros(2, 2, 15))},
        ValueError,
        "state.kv:",
    ),
    "state k device": (
        {"state": RebasedState(torch.zeros(2, 2, 15, 7), torch.zeros(2, 2, 15, device="meta"))},
        ValueError,
        "state.k:",
    ),
    "index device": ({"state_index": torch.tensor([0, 1], device="meta")}, ValueError, "state_index:"),
    "index type": ({"state_index": [0, 1]}, TypeError, "state_index:"),
    "index dtype": ({"state_index": torch.tensor([0.0, 1.0])}, TypeError, "state_index:"),
    "index shape": ({"state_index": torch.tensor([0])}, ValueError, "state_index:"),
    "index too large": ({"state_index": torch.tensor([0, 2])}, ValueError, "state_index:"),
    "index too small": ({"state_index": torch.tensor([-2, 0])}, ValueError, "state_index:"),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", BAD_STEP)
def test_step_state_and_index(name, grad):
    changes, error, words = BAD_STEP[name]
    state = RebasedState.zeros(2, 2, 5, 7)
    with torch.set_grad_enabled(grad), pytest.raises(error, match=_names(words)):
        rebased_attention_step(**{**step_arguments(), "state": state, **changes})
    assert not state.kv.any()


@pytest.mark.parametrize("grad", [True, False])
def test_a_strided_index_is_taken(grad):
    index = torch.arange(4)[::2]
    one, other = RebasedState.zeros(3, 2, 5, 7), RebasedState.zeros(3, 2, 5, 7)
    given = step_arguments()
    with torch.set_grad_enabled(grad):
        y = rebased_attention_step(**given, state=one, state_index=index)
        expected = rebased_attention_step(**given, state=other, state_index=index.contiguous())
    assert torch.equal(y, expected)
    assert torch.equal(one.kv, other.kv)


def test_a_refused_call_keeps_no_tensor():
    """Not even until the next garbage collection: whoever runs out of memory wants to try again."""
    given = arguments(v=torch.randn(2, 3, 6, 7))
    q = weakref.ref(given["q"])
    gc.disable()
    try:
        with torch.no_grad(), contextlib.suppress(ValueError):
            rebased_attention(**given)
        del given
        assert q() is None
    finally:
        gc.enable()


def test_raw_operator_has_a_backstop():
    """Whoever calls the operator itself gets a ValueError, not a crash."""
    q, k, v = torch.randn(Q), torch.randn(K), torch.randn(V)
    options = ("outer", "none", 1.0, 1e-6, 1e-5, True)
    forward, step = torch.ops.rebased_cuda.forward_with_state, torch.ops.rebased_cuda.step
    nothing = [None] * 4
    for bad in (
        (q[0], k, v, *nothing, None, None, None),
        (q, k[:, :, :3], v, *nothing, None, None, None),
        (q, k.double(), v, *nothing, None, None, None),
        (q, k, v, torch.randn(3), None, None, None, None, None, None),
        (q, k, v, *nothing, torch.zeros(2, 2, 15, 7), None, None),
        (q, k, v, *nothing, torch.zeros(2, 2, 15, 7), torch.zeros(2, 2, 14), None),
        (q, k, v, *nothing, None, None, torch.tensor([0, 6])),
    ):
        with pytest.raises(ValueError, match="rebased_cuda: "):
            forward(*bad, *options, True)
    with pytest.raises(ValueError, match="feature_map"):
        forward(q, k, v, *nothing, None, None, None, "nonsense", *options[1:], False)
    with pytest.raises(ValueError, match="state"):
        step(
            q[:, :, 0],
            k[:, :, 0],
            v[:, :, 0],
            *nothing,
            torch.zeros(2, 2, 3, 7),
            torch.zeros(2, 2, 3),
            None,
            *options,
        )


def _freed(x, keep):
    """x, its storage cut to `keep` bytes, as sharding leaves parameters between two uses."""
    x = torch.cat([torch.zeros(3, dtype=x.dtype), x.detach().flatten()])[3:].view(x.shape)
    x.untyped_storage().resize_(keep)
    return x


KEPT = (0, 8)  # freed, or less than all; with an offset into the storage the address is not even null


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["q", "k", "v", "gamma_q", "beta_q", "gamma_k", "beta_k"])
def test_freed_memory_is_refused(name, grad, keep):
    given = {**arguments(), "gamma_k": torch.randn(2, 5), "beta_q": torch.randn(5)}
    state = RebasedState.zeros(2, 2, 5, 7)
    wide = "gamma" in name or "beta" in name
    with torch.set_grad_enabled(grad):
        for dtype in (torch.float32, torch.bfloat16) if wide else (torch.float32,):  # the latter is cast
            with pytest.raises(ValueError, match=_names(f"{name}: its storage was freed")):
                rebased_attention(**{**given, name: _freed(given[name].to(dtype), keep)})
            row = step_arguments(**given)
            with pytest.raises(ValueError, match=_names(f"{name}: its storage was freed")):
                rebased_attention_step(**{**row, name: _freed(row[name].to(dtype), keep)}, state=state)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=_names(f"{name}: its s")):
            rebased_attention(**{**given, name: _freed(given[name], keep)})
    assert not state.kv.any()


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("grad", [True, False])
def test_freed_states_and_indices_are_refused(grad, keep):
    row = step_arguments()
    with torch.set_grad_enabled(grad):
        for part in ("kv", "k"):
            state = RebasedState.zeros(2, 2, 5, 7)
            state = state._replace(**{part: _freed(getattr(state, part), keep)})
            with pytest.raises(ValueError, match=_names(f"state.{part}: its storage was freed")):
                rebased_attention_step(**row, state=state)
            with pytest.raises(ValueError, match=_names(f"initial_state.{part}: its storage was freed")):
                rebased_attention(**arguments(), initial_state=state)
        for dtype in (torch.int32, torch.int64):
            index = _freed(torch.tensor([0, 1], dtype=dtype), keep)
            with pytest.raises(ValueError, match=_names("state_index: its storage was freed")):
                rebased_attention_step(**row, state=RebasedState.zeros(2, 2, 5, 7), state_index=index)
            with pytest.raises(ValueError, match=_names("cu_seqlens: its storage was freed")):
                rebased_attention(**ONE, cu_seqlens=_freed(torch.tensor([0, 6], dtype=dtype), keep))


@pytest.mark.parametrize("name", ["q", "k", "v", "gamma_q", "beta_k"])
def test_memory_freed_before_backward_is_refused(name):
    given = arguments()
    given = {key: x.requires_grad_() for key, x in given.items()}
    y = rebased_attention(**given)
    given[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=_names(f"{name}: its storage was freed")):
        y.sum().backward()


def test_memory_that_is_all_there_is_taken():
    """A tensor that ends where its storage does, and one of no elements whose storage is freed."""
    given = arguments()
    whole = rebased_attention(**given)
    last = {key: torch.cat([torch.zeros(3), x.flatten()])[3:].view(x.shape) for key, x in given.items()}
    assert torch.equal(rebased_attention(**last), whole)
    none = {key: x[:, :, :0] if x.dim() == 4 else x for key, x in given.items()}
    none["q"].untyped_storage().resize_(0)
    assert rebased_attention(**none).shape == (2, 4, 0, 7)


LAYOUTS = {
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.as_nested_tensor(list(x.unbind())),
    "jagged": lambda x: torch.nested.as_nested_tensor(list(x.unbind()), layout=torch.jagged),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # each of these says that it is a prototype
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_are_refused_by_name(layout, grad):
    given = {
        **arguments(),
        "gamma_k": torch.randn(2, 5),
        "beta_q": torch.randn(4, 5),
        "beta_k": torch.randn(2, 5),
    }
    row = step_arguments(**given)
    make = LAYOUTS[layout]
    state = RebasedState.zeros(2, 2, 5, 7)
    with torch.set_grad_enabled(grad):
        for name in given:
            with pytest.raises(ValueError, match=_names(f"{name}: expected a dense tensor")):
                rebased_attention(**{**given, name: make(given[name])})
            with pytest.raises(ValueError, match=_names(f"{name}: expected a dense tensor")):
                rebased_attention_step(**{**row, name: make(row[name])}, state=state)
        for part in ("kv", "k"):
            bad = state._replace(**{part: make(getattr(state, part))})
            with pytest.raises(ValueError, match=_names(f"state.{part}: expected a dense tensor")):
                rebased_attention_step(**row, state=bad)
            with pytest.raises(ValueError, match=_names(f"initial_state.{part}: expected a dense tensor")):
                rebased_attention(**given, initial_state=bad)
        if layout == "sparse":
            index = torch.tensor([0, 1]).to_sparse()
            with pytest.raises(ValueError, match=_names("state_index: expected a dense tensor")):
                rebased_attention_step(**row, state=state, state_index=index)
            with pytest.raises(ValueError, match=_names("cu_seqlens: expected a dense tensor")):
                rebased_attention(**ONE, cu_seqlens=index)
    assert not state.kv.any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_index_expanded_beyond_memory_is_refused(dtype):
    huge = torch.zeros(1, dtype=dtype).expand(1 << 40)
    with pytest.raises(ValueError, match=_names("cu_seqlens: expected memory")):
        rebased_attention(**ONE, cu_seqlens=huge)
    with pytest.raises(ValueError, match=_names("state_index: expected shape")):
        rebased_attention_step(**step_arguments(), state=RebasedState.zeros(2, 2, 5, 7), state_index=huge)
    assert not rebased_attention(**ONE, cu_seqlens=huge[:3]).any()  # two sequences of no rows


NUMPY = {
    "scale": (np.float32(0.5), np.float64(0.5), np.float16(0.5), np.int64(1)),
    "eps": (np.float32(1e-3), np.float64(1e-3), np.int32(1)),
    "layer_norm_eps": (np.float32(1e-3), np.float64(1e-3), np.uint8(1)),
    "normalize": (np.bool_(True), np.bool_(False)),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", NUMPY)
def test_numpy_scalars_are_numbers(name, grad):
    given = arguments()
    for value in NUMPY[name]:
        with torch.set_grad_enabled(grad):
            options = {"layer_norm": "head", name: value}
            plain = {"layer_norm": "head", name: value.item()}
            assert torch.equal(rebased_attention(**given, **options), rebased_attention(**given, **plain))
            states = RebasedState.zeros(2, 2, 5, 7), RebasedState.zeros(2, 2, 5, 7)
            row = step_arguments(**given)
            y, expected = (
                rebased_attention_step(**row, state=state, **chosen)
                for state, chosen in zip(states, (options, plain), strict=True)
            )
            assert torch.equal(y, expected)


def test_numpy_bools_and_integers_elsewhere():
    _, state = rebased_attention(**arguments(), return_state=np.bool_(True))
    assert isinstance(state, RebasedState)
    assert isinstance(rebased_attention(**arguments(), return_state=np.bool_(False)), torch.Tensor)
    assert RebasedState.zeros(np.int64(2), np.int32(2), np.int64(5), np.uint8(7)).kv.shape == (2, 2, 15, 7)


@pytest.mark.parametrize("grad", [True, False])
def test_what_is_no_number_is_refused(grad):
    """numpy's bool is no number, and its arrays are none either."""
    for value in (
        np.bool_(True),
        np.array([1.0]),
        np.array(1.0),
        np.complex64(1),
        torch.tensor(1.0),
        1j,
        "1",
        True,
    ):
        for name in ("scale", "eps", "layer_norm_eps"):
            with (
                torch.set_grad_enabled(grad),
                pytest.raises(TypeError, match=_names(f"{name}: expected a float")),
            ):
                rebased_attention(**arguments(), **{name: value})
    for value in (np.float32("nan"), np.float64("inf"), np.float16("-inf"), 10**400, -(10**400)):
        for name in ("scale", "eps", "layer_norm_eps"):
            with (
                torch.set_grad_enabled(grad),
                pytest.raises(ValueError, match=_names(f"{name}: expected a finite")),
            ):
                rebased_attention(**arguments(), **{name: value})


class _Call(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.gamma = torch.nn.Parameter(torch.randn(5))

    def forward(self, q, k, v):
        return rebased_attention(q, k, v, self.gamma, layer_norm="token", **self.options)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace(scale, grad, tmp_path):
    """Sizes are tensors while torch.jit.trace follows: no complaint, no warning, and good for other sizes."""
    q, k, v = (torch.randn(x) for x in (Q, K, V))
    call = _Call(scale=scale, return_state=False)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(call, (q, k, v))  # runs it again, and compares
    torch.jit.save(traced, tmp_path / "call.pt")
    longer = [torch.cat([x, x], 2)[:1] for x in (q, k, v)]
    with torch.no_grad():
        for loaded in (traced, torch.jit.load(tmp_path / "call.pt")):
            assert torch.equal(loaded(*longer), call(*longer))


def test_a_traced_step():
    row = [torch.randn(2, 4, 5), torch.randn(2, 2, 5), torch.randn(2, 2, 7)]

    def decode(q, k, v, kv, k_sum):
        return rebased_attention_step(q, k, v, RebasedState(kv, k_sum))

    with torch.no_grad():
        traced = torch.jit.trace(decode, (*row, *RebasedState.zeros(2, 2, 5, 7)), check_trace=False)
        state, other = RebasedState.zeros(2, 2, 5, 7), RebasedState.zeros(2, 2, 5, 7)
        assert torch.equal(traced(*row, *state), decode(*row, *other))
    assert torch.equal(state.kv, other.kv)


BAD_ZEROS = {
    "batch": (-1, 2.0, "2", True, None, torch.tensor(2), np.float32(2)),
    "kv_heads": (0, -1, 2.0, "2", True, None, torch.tensor(2)),
    "feature_dim": (0, 129, 5.0, "5", True, None),
    "head_dim": (0, 257, 7.0, "7", True, None),
    "feature_map": ("relu", None, 3, ["outer"], torch.zeros(2)),
    "dtype": (torch.float16, torch.bfloat16, torch.int32, torch.complex64, "float32", None),
    "device": ("nowhere", -7, 1.5, True, ["cpu"]),
}


@pytest.mark.parametrize("name", BAD_ZEROS)
def test_zeros_names_the_argument(name):
    sizes = {"batch": 2, "kv_heads": 2, "feature_dim": 5, "head_dim": 7}
    assert RebasedState.zeros(**{**sizes, "feature_dim": 128, "head_dim": 256}).kv.shape == (2, 2, 8256, 256)
    for value in BAD_ZEROS[name]:
        with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
            RebasedState.zeros(**{**sizes, name: value})


def test_index_select_names_the_argument():
    state = RebasedState(torch.randn(3, 2, 15, 7), torch.randn(3, 2, 15))
    assert torch.equal(state.index_select(torch.tensor([2, 2])).k, state.k[[2, 2]])
    for index in (
        [0, 1],
        None,
        1,
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
        torch.tensor([0, 1], dtype=torch.int16),
        torch.tensor([[0, 1]]),
        torch.tensor(1),
        torch.tensor([0, 3]),
        torch.tensor([-1, 0]),
        torch.tensor([0, 1], device="meta"),
        torch.tensor([0, 1]).to_sparse(),
        _freed(torch.tensor([0, 1]), 0),
    ):
        with pytest.raises((ValueError, TypeError), match=r"^index: "):
            state.index_select(index)
    for part in ("kv", "k"):
        with pytest.raises(ValueError, match=f"^{part}: its storage was freed"):
            state._replace(**{part: _freed(getattr(state, part), 0)}).index_select(torch.tensor([0, 1]))


def test_a_state_is_moved_copied_and_detached():
    state = RebasedState(torch.randn(2, 2, 15, 7).requires_grad_(), torch.randn(2, 2, 15).requires_grad_())
    for call in (
        lambda: state.to("cpu"),
        lambda: state.to(device="cpu", dtype=torch.float32),
        lambda: state.to(torch.device("cpu"), non_blocking=True),
        lambda: state.to(state.k),
    ):
        same = call()
        assert same.kv is state.kv
        assert same.k is state.k
    wide = state.to(torch.float64)
    assert isinstance(wide, RebasedState)
    assert (wide.kv.dtype, wide.k.dtype) == (torch.float64, torch.float64)
    assert state.to("meta").kv.device.type == "meta"
    for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.complex64):
        with pytest.raises(ValueError, match=r"^dtype: a state is float32 or float64"):
            state.to(dtype)
    copied, bare = state.clone(), state.detach()
    assert isinstance(copied, RebasedState)
    assert isinstance(bare, RebasedState)
    assert (copied.kv.requires_grad, bare.kv.requires_grad, bare.k.requires_grad) == (True, False, False)
    for ours, x in ((copied.kv, state.kv), (copied.k, state.k)):
        assert torch.equal(ours, x)
        assert ours.data_ptr() != x.data_ptr()
    assert (bare.kv.data_ptr(), bare.k.data_ptr()) == (state.kv.data_ptr(), state.k.data_ptr())


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle"])
def test_a_state_copies_and_pickles(how):
    state = RebasedState(torch.randn(2, 2, 15, 7), torch.randn(2, 2, 15))
    made = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}[
        how
    ](state)
    assert isinstance(made, RebasedState)
    assert torch.equal(made.kv, state.kv)
    assert torch.equal(made.k, state.k)
    assert (made.kv is state.kv) == (how == "copy")


def test_a_saved_state_loads_in_another_process(tmp_path):
    """torch.load reads only classes that it was told of by default: to import this one tells it."""
    state = RebasedState(torch.randn(2, 2, 15, 7), torch.randn(2, 2, 15))
    torch.save({"states": [state, None], "step": 3}, tmp_path / "state.pt")
    program = (
        "import sys, torch; from rebased_cuda import RebasedState\n"
        "state, nothing = torch.load(sys.argv[1])['states']\n"
        "assert type(state) is RebasedState and nothing is None\n"
        "print(state.kv.double().sum().item(), state.k.shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "state.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(state.kv.double().sum().item())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_nested_pool_is_refused_by_name():
    """Where slots are named the pool's first size is read before the rest of it is checked."""
    pool = RebasedState.zeros(3, 2, 5, 7)
    nested = pool._replace(kv=torch.nested.as_nested_tensor(list(pool.kv.unbind())))
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(ValueError, match=_names("state.kv: expected a dense")),
        ):
            rebased_attention_step(**step_arguments(), state=nested, state_index=torch.tensor([0, 2]))
