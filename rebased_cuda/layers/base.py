"""What both layers share: the process group that context_parallelize gives them, and checks of inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import DTYPES, fail, untraced
from ..state import check_layout, check_memory, extent

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Looked up once: a layer's call takes microseconds, of which a look-up is a part.
_is_tracing = torch._C._is_tracing
_is_compiling = torch.compiler.is_compiling


class _SharedGroup:
    """A process group as a layer holds it: a copy of the layer shares it, a pickle leaves it out."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _SharedGroup:
        return self

    def __reduce__(self) -> tuple[type[_SharedGroup], tuple[None]]:
        return _SharedGroup, (None,)


class ContextParallelLayer(nn.Module):
    """A layer that context_parallelize can give a process group."""

    _shared_group = _SharedGroup(None)

    @property
    def context_parallel_group(self) -> ProcessGroup | None:
        """Set by context_parallelize: the input is then this rank's rows of a sequence over the group.

        copy.deepcopy gives a layer with the same group. A pickle, and so torch.save of a module, leaves the
        group out, since it means nothing to another process: what is loaded takes its input for whole
        sequences until context_parallelize is called for it.
        """
        return self._shared_group.group

    @context_parallel_group.setter
    def context_parallel_group(self, group: ProcessGroup | None) -> None:
        self._shared_group = _SharedGroup(group)


def refuse_in_shards(**arguments: object) -> None:
    """Refuses what a layer cannot take of a sequence that is shared out over ranks."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name}: not supported under context parallelism, where a row's tokens lie on several "
                "ranks; pad every row behind its tokens and leave masks out, or call "
                "context_parallel_rebased_attention, which takes cu_seqlens and an initial state"
            )


def refuse_gradients(layer: nn.Module, call: str, *tensors: Tensor) -> None:
    if not torch.is_grad_enabled():  # first: to list the parameters takes as long as a Linear of one token
        return
    if any(x.requires_grad for x in (*tensors, *layer.parameters())):
        raise RuntimeError(f"{type(layer).__name__}.{call} is for inference: call it under torch.no_grad().")


def call(name: str, x: Tensor, *modules: nn.Linear | nn.Conv1d) -> list[Any]:
    """[module(x) for each module], where an error that lies in x names it.

    x and the weights are compared only after a call has failed: until then hooks may still bring them
    together, as offloading and mixed precision do.
    """
    if x.is_meta:  # which a Linear may take without a word
        for module in modules:
            if not module.weight.is_meta:
                raise fail(name, f"the weights' device {module.weight.device}", x.device)
    try:
        return [module(x) for module in modules]
    except RuntimeError:
        for module in modules:
            weight = module.weight
            if weight.dtype in DTYPES and _multiplied_in(x) != _multiplied_in(weight):
                raise TypeError(
                    f"{name}: expected the weights' dtype {weight.dtype}, got {x.dtype}"
                ) from None
            if not weight.is_meta and x.device != weight.device:
                raise fail(name, f"the weights' device {weight.device}", x.device) from None
        raise


def _multiplied_in(x: Tensor) -> torch.dtype:
    """The dtype in which products take x: its own, or autocast's."""
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def is_plain_call(module: nn.Module) -> bool:
    """Whether to call the module would run the forward of its class and nothing besides.

    That is what nn.Module.__call__ asks itself, and whether another forward has been put into the module.
    """
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
        or "forward" in module.__dict__
        or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def check_shape(name: str, x: object, shape: tuple[int | str, ...]) -> Tensor:
    """A dense tensor; sizes given as a number must be met, those given as a letter may be any."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    check_layout(name, x)  # before its shape, which a nested tensor has not
    if not untraced(fits, x, shape):
        raise fail(name, f"shape ({', '.join(str(size) for size in shape)})", tuple(x.shape))
    check_memory(name, x)
    return x


def fits(x: Tensor, shape: tuple[int | str, ...]) -> bool:
    if x.dim() != len(shape):
        return False
    for size, given in zip(shape, x.shape, strict=True):  # a generator takes as long as all the rest
        if type(size) is not str and size != given:
            return False
    return True


def check_input(name: str, x: Tensor, shape: tuple[int | str, ...]) -> None:
    """As `check_shape`, of one of the operators' dtypes.

    A Linear leaves none of Python's code in the caches, so that a call here costs ten times what it does in a
    loop: an input that is right is asked the fewest questions.
    """
    if type(x) is Tensor and _is_right(x, shape):
        return
    check_shape(name, x, shape)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected dtype float32, float64, float16 or bfloat16, got {x.dtype}")


def _is_right(x: Tensor, shape: tuple[int | str, ...]) -> bool:
    """Whether x is such as check_input asks; False where to tell takes more than a look."""
    if _is_compiling() or _is_tracing():  # in this order: dynamo refuses the latter
        return False
    try:
        return (
            x.dtype in DTYPES
            and fits(x, shape)
            and x.is_contiguous()
            and x.storage_offset() * x.element_size() + x.nbytes <= x.untyped_storage().nbytes()
        )
    except RuntimeError:  # a nested tensor has no shape; sparse ones, and those of torch.func, no storage
        return False


def check_token(name: str, x: Tensor, hidden_size: int) -> Tensor:
    """x, one token of each sequence, (B, hidden_size) or (B, 1, hidden_size), as (B, hidden_size)."""
    if isinstance(x, Tensor) and x.dim() == 3:
        check_input(name, x, ("B", 1, hidden_size))
        return x.squeeze(1)
    check_input(name, x, ("B", hidden_size))
    return x


def check_writable(name: str, x: Tensor) -> None:
    """That writing to x does what it says."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():  # which know no memory
        return
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name}: was made under torch.inference_mode() and cannot be updated outside it; clone it first"
        )
    if x.numel() == 0 or x.is_meta:
        return
    spread = 0  # of the elements along the dimensions with smaller strides
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= spread:
            given = f"shape {tuple(x.shape)} with strides {x.stride()}"
            raise fail(name, "elements apart in memory, since it is updated in place", given)
        spread += stride * (size - 1)


def check_apart(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """That writing to x does nothing to `other` (of the same dtype and device)."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or x.numel() == 0 or x.is_meta:
        return
    if type(x) is Tensor and type(other) is Tensor and _share_memory(x, other):  # a subclass may have none
        raise ValueError(f"{name}: expected memory apart from {other_name}'s, since it is updated in place")


def check_slots_apart(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """That no slot of x meets one of `other`; both (slots, ...) of the same dtype, slots apart in themselves.

    They may lie in the same pages: where these are of one size, what holds in one page holds in all.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or x.numel() == 0 or x.is_meta:
        return
    if type(x) is not Tensor or type(other) is not Tensor:  # a subclass may have no memory
        return
    low, high = sorted((x, other), key=Tensor.data_ptr)
    distance, size = high.data_ptr() - low.data_ptr(), x.element_size()
    if distance >= extent(low) * size:
        return
    if x.stride(0) == other.stride(0) and x.shape[0] > 1:
        distance, pitch = distance % (x.stride(0) * size), x.stride(0) * size
        if distance >= extent(low[0]) * size and pitch - distance >= extent(high[0]) * size:
            return
    raise ValueError(f"{name}: expected memory apart from {other_name}'s, since both are updated in place")


def _share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether an element of x is one of y; both of the same dtype, neither empty."""

    def end(x: Tensor) -> int:
        return x.data_ptr() + extent(x) * x.element_size()

    def addresses(x: Tensor) -> Tensor:
        result = torch.tensor(x.data_ptr(), device="cpu")
        for stride, size in zip(x.stride(), x.shape, strict=True):
            steps = torch.arange(size, device="cpu") * (stride * x.element_size())
            result = result.unsqueeze(-1) + steps
        return result

    if x.data_ptr() >= end(y) or y.data_ptr() >= end(x):  # as good as always
        return False
    return bool(torch.isin(addresses(x), addresses(y)).any())
