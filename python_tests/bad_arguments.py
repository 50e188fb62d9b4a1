"""What kinds of arguments there are, and how each can be wrong: the vocabulary of test_fuzz_bad_calls.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = (
    "type",
    "dtype",
    "device",
    "rank",
    "size + 1",
    "size - 1",
    "layout",
    "range",
    "nan",
    "inf",
    "empty",
    "alias",
)
"""range: a value of the right type that means nothing; empty: a storage freed or shrunk under the tensor;
alias: memory that the call writes and another argument, or another element, has too."""

Values = dict[str, Any]
Make = Callable[[Any, random.Random, Values], Any]  # the good value, the good values of all: a bad one
TENSOR_ONLY = dict.fromkeys(("dtype", "device", "rank", "layout", "empty"), "it is no tensor")
NOT_WRITTEN = {"alias": "the call does not write it, and what it writes is tried against it"}


@dataclass(frozen=True)
class Argument:
    """How one argument can be wrong; every kind has a way, or a reason why there is none."""

    ways: dict[str, Make] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def but(self, ways: dict[str, Make] | None = None, **reasons: str) -> Argument:
        """With other ways, or reasons (underscores for spaces) in place of ways."""
        named = {
            name.replace("_plus_", " + ").replace("_minus_", " - "): why for name, why in reasons.items()
        }
        kept = {kind: way for kind, way in {**self.ways, **(ways or {})}.items() if kind not in named}
        return Argument(kept, {**{k: r for k, r in self.reasons.items() if k not in kept}, **named})


def pick(*values: Any) -> Make:
    return lambda good, rng, all_values: rng.choice(values)


def _resized(by: int, dims: tuple[int, ...]) -> Make:
    def make(x: Tensor, rng: random.Random, _: Values) -> Tensor:
        sizes = list(x.shape)
        sizes[rng.choice([dim for dim in dims if dim < x.dim()])] += by
        return torch.zeros(sizes, dtype=x.dtype)

    return make


def freed(x: Tensor, rng: random.Random, _: Values) -> Tensor:
    """x in a storage of its own, of which too little is left; sometimes with an offset into it."""
    before = rng.choice((0, 3))
    x = torch.cat([torch.zeros(before, dtype=x.dtype), x.detach().flatten()])[before:].view(x.shape)
    held = x.untyped_storage().nbytes()
    x.untyped_storage().resize_(rng.choice((0, x.element_size(), held - 1)))
    return x


def _rank(x: Tensor, rng: random.Random, _: Values) -> Tensor:
    return rng.choice((x.unsqueeze(0), x[0], x.unsqueeze(-1), x.flatten()[0]))


def _more_dims(x: Tensor, rng: random.Random, _: Values) -> Tensor:
    return rng.choice((x.unsqueeze(0).unsqueeze(0), x.unsqueeze(-1).unsqueeze(-1), x.flatten()[0]))


def _layout(x: Tensor, rng: random.Random, _: Values) -> Tensor:
    ways = [lambda: x.to_sparse()]
    if x.dtype == torch.float32:
        ways += [lambda: x.to_mkldnn(), lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)]
    if x.dim() > 1:
        ways += [
            lambda: x[0].to_sparse_csr() if x.dim() == 3 else x.to_sparse(),
            lambda: torch.nested.as_nested_tensor(list(x.unbind())),
            lambda: torch.nested.as_nested_tensor(list(x.unbind()), layout=torch.jagged),
        ]
    return rng.choice(ways)()


def _cast(*dtypes: torch.dtype) -> Make:
    return lambda x, rng, _: x.to(rng.choice(dtypes))


NOT_TENSORS = ([1.0, 2.0], "q", 3.5, {"a": 1}, np.zeros(2), np.float32(1), (), b"", object)
NOT_REAL = (torch.int64, torch.int8, torch.bool, torch.complex64, torch.complex128)
OTHER_REAL = (torch.float64, torch.float16, torch.bfloat16)


def tensor(
    dims: tuple[int, ...], other_floats: bool = True, optional: bool = False, ranks: Make = _rank
) -> Argument:
    """A float32 tensor of which `dims` have sizes that other arguments fix."""
    ways: dict[str, Make] = {
        "type": pick(*NOT_TENSORS, *(() if optional else (None,))),
        "dtype": _cast(*NOT_REAL, *(OTHER_REAL if other_floats else ())),
        "device": lambda x, rng, _: x.to("meta"),
        "rank": ranks,
        "size + 1": _resized(1, dims),
        "size - 1": _resized(-1, dims),
        "layout": _layout,
        "empty": freed,
    }
    reasons = dict.fromkeys(("range", "nan", "inf"), "any number may stand in a tensor") | NOT_WRITTEN
    if not dims:
        free = "no other argument fixes a size of it"
        return Argument(ways, reasons).but(size_plus_1=free, size_minus_1=free)
    return Argument(ways, reasons)


def affine() -> Argument:
    """gamma or beta: (d,), (heads, d) or (heads * d,), any floating-point dtype."""
    return tensor((0, 1), other_floats=False, optional=True, ranks=_more_dims)


def index(range_: Make, size: bool) -> Argument:
    """cu_seqlens or state_index; `size`: whether another argument fixes how many there are."""
    ways: dict[str, Make] = {
        "type": pick(*NOT_TENSORS),
        "dtype": _cast(torch.float32, torch.int16, torch.uint8, torch.bool, torch.complex64),
        "device": lambda x, rng, _: x.to("meta"),
        "rank": lambda x, rng, _: rng.choice((x.unsqueeze(0), x[0])),
        "size + 1": lambda x, rng, _: torch.cat([x, x[-1:]]),
        "size - 1": lambda x, rng, _: x[:-1],
        "layout": lambda x, rng, _: x.to_sparse(),
        "range": range_,
        "empty": freed,
    }
    made = Argument(ways, dict.fromkeys(("nan", "inf"), "integers have none") | NOT_WRITTEN)
    if size:
        return made
    free = "any number of sequences will do; a state is held against it"
    return made.but(size_plus_1=free, size_minus_1=free)


NO_SIZE = dict.fromkeys(("size + 1", "size - 1"), "it has no size")


def number(least: float | None = 0.0, optional: bool = False) -> Argument:
    ways: dict[str, Make] = {
        "type": pick("1", [1.0], True, 1j, torch.tensor(1.0), np.bool_(True), *(() if optional else (None,))),
        "nan": pick(float("nan"), np.float32("nan"), np.float64("nan")),
        "inf": pick(float("inf"), -float("inf"), np.float32("inf"), 10**400),
    }
    if least is not None:
        ways["range"] = pick(-1.0, -1e-30, np.float32(-1), -1)
    reasons = TENSOR_ONLY | NO_SIZE | {"alias": "a number has no memory"}
    return Argument(ways, reasons | ({} if least is not None else {"range": "any finite number will do"}))


NO_NUMBER = dict.fromkeys(("nan", "inf"), "it is no number")


def flag() -> Argument:
    ways = {"type": pick(1, 0, "True", None, 0.5, torch.tensor(True), np.int64(1), np.array([True]))}
    reasons = TENSOR_ONLY | NO_SIZE | NO_NUMBER | {"alias": "a bool has no memory"}
    return Argument(ways, reasons | {"range": "both values mean something"})


def name(optional: bool = False) -> Argument:
    ways = {
        "type": pick(3, 1.5, ["outer"], b"outer", True, np.zeros(2), *(() if optional else (None,))),
        "range": pick("relu", "", "OUTER", "none"),
    }
    return Argument(ways, TENSOR_ONLY | NO_SIZE | NO_NUMBER | {"alias": "a name has no memory"})


def size(least: int, most: int | None = None, optional: bool = False) -> Argument:
    ways = {
        "type": pick(2.0, "2", [2], True, torch.tensor(2), np.float64(2), *(() if optional else (None,))),
        "range": pick(least - 1, -7, np.int64(least - 1), *(() if most is None else (most + 1, 1 << 40))),
        "nan": pick(float("nan"), np.float32("nan")),
        "inf": pick(float("inf"), -float("inf")),
    }
    return Argument(ways, TENSOR_ONLY | NO_SIZE | {"alias": "a number has no memory"})


def only(reason: str, **ways: Make) -> Argument:
    """Wrong in the given ways; every other has the one reason."""
    return Argument(dict(ways), {kind: reason for kind in KINDS if kind not in ways})
