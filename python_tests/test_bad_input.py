"""Every argument, wrong in every way: the error names it, and nothing in place is touched."""

import contextlib
import gc
import re
import weakref

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
    forward, step = torch.ops.rebased_cuda.forward, torch.ops.rebased_cuda.step
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
            torch.zeros(2, 2, 3, 7),
            torch.zeros(2, 2, 3),
            *nothing,
            None,
            *options,
        )
