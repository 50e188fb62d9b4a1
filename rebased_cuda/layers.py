"""The two layers of the authors' hybrid: a gated short convolution first, then ReBased attention.

Both have `forward` for training, `prefill` and `step` for decoding: prefill reads a prompt and gives what the
layer remembers of it, step takes one token more and updates that in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from ._checks import _DTYPES, check_bool, check_options, fail, untraced
from .attention import rebased_attention, rebased_attention_step
from .reference import attention_matrix
from .state import MAX_FEATURE_DIM, MAX_HEAD_DIM, RebasedState, check_layout, check_memory, check_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class QueryKeyNorm(nn.LayerNorm):
    """gamma and beta of a layer's queries or keys: the module `ln_q` or `ln_k`.

    The operator does the LayerNorm and the affine itself, so the layer calls this module with None and gets
    gamma and beta from it. It calls, and does not read the attributes, because whatever takes hold of a
    module does so at its call: hooks, offloading, sharding, adapters and pruning. It is an nn.LayerNorm,
    because optimisers that spare norms from weight decay look for one.

    Args:
        heads, feature_dim: gamma and beta have heads * feature_dim entries.
        layer_norm: "token", "head" or None, as in `ReBasedAttention`.
        eps: added to the variance.
        use_gamma, use_beta: False leaves gamma (weight) or beta (bias) out.
    """

    def __init__(
        self,
        heads: int,
        feature_dim: int,
        layer_norm: str | None,
        eps: float,
        use_gamma: bool,
        use_beta: bool,
    ) -> None:
        super().__init__(heads * feature_dim, eps, use_gamma or use_beta, use_beta)
        self.feature_dim = feature_dim
        self.layer_norm = layer_norm
        if not use_gamma:
            self.register_parameter("weight", None)

    def reset_parameters(self) -> None:
        """gamma = 1 and beta = 0, as far as there are any."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @overload
    def forward(self, input: None) -> tuple[Tensor | None, Tensor | None]: ...

    @overload
    def forward(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor | None) -> Tensor | tuple[Tensor | None, Tensor | None]:
        """What the layer does to its queries or keys, or, of None, the parameters to do it with.

        Args:
            input: (..., heads * feature_dim), what proj_q or proj_k gives; or None. An argument must be
                given: wrappers, such as PEFT's for the tuning of norms, hand on the first one.

        Returns:
            Of a tensor: (..., heads * feature_dim), gamma * LayerNorm(input) + beta, with the LayerNorm over
            all entries for "token" (that of nn.LayerNorm), over each head's for "head", and none for None.
            Of None: (gamma, beta), (heads * feature_dim,) each, float32 or float64, None where it is left
            out. They are copies, because fully_shard frees the parameters when the call returns, before the
            operator reads them.
        """
        if input is None:
            return _copy(self.weight), _copy(self.bias)
        if self.layer_norm == "token":
            return super().forward(input)
        if self.layer_norm == "head":
            heads = input.reshape(*input.shape[:-1], -1, self.feature_dim)
            input = nn.functional.layer_norm(heads, (self.feature_dim,), eps=self.eps).flatten(-2)
        if self.weight is not None:
            input = input * self.weight
        return input if self.bias is None else input + self.bias


def _copy(parameter: Tensor | None) -> Tensor | None:
    """A copy in float32, or in float64 of float64: what the operator computes in."""
    if parameter is None:
        return None
    return parameter.clone() if parameter.dtype in (torch.float32, torch.float64) else parameter.float()


class _SharedGroup:
    """A process group as a layer holds it: a copy of the layer shares it, a pickle leaves it out."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _SharedGroup:
        return self

    def __reduce__(self) -> tuple[type[_SharedGroup], tuple[None]]:
        return _SharedGroup, (None,)


class _ContextParallelLayer(nn.Module):
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


class ReBasedAttention(_ContextParallelLayer):
    """Multi-head ReBased attention: projections, LayerNorm and affine of q and k, linear attention.

    With the defaults it is the authors' layer, in arithmetic and in the names of its state dict, so that
    their checkpoints load with a strict load_state_dict: proj_q, proj_k, proj_v, proj_o (.weight), ln_q and
    ln_k (.weight = gamma, .bias = beta, one entry per head and feature).

    gamma and beta come from calling ln_q and ln_k (`QueryKeyNorm`), so that hooks, offloading, sharding and
    adapters of these modules work. A plain nn.LayerNorm put in the place of one is read instead. The operator
    takes gamma and beta in float32 whatever dtype they have (float64 for float64 inputs).

    Args:
        hidden_size: width of x.
        num_heads: query heads.
        feature_dim: d, the width of one head's q and k, 1 to 128.
        num_kv_heads: heads of k and v, a divisor of num_heads; num_heads when None. Query head h uses kv head
            h // (num_heads / num_kv_heads).
        head_dim: dv, the width of one head's v, 1 to 256; when None
            hidden_size // (num_kv_heads or num_heads), which need not divide evenly.
        feature_map, scale, eps, layer_norm_eps: as in `rebased_attention`.
        layer_norm: "token" (over all heads' features of a token together, the authors'), "head" or None.
        use_gamma, use_beta: False leaves gamma (ln_q.weight, ln_k.weight) or beta (the .bias) out.

    NumPy's numbers are taken as Python's are.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 12,
        feature_dim: int = 16,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        feature_map: str = "outer",
        layer_norm: str | None = "token",
        use_gamma: bool = True,
        use_beta: bool = True,
        scale: float | None = None,
        eps: float = 1e-12,
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden_size = check_size("hidden_size", hidden_size, 1)
        num_heads = check_size("num_heads", num_heads, 1)
        feature_dim = check_size("feature_dim", feature_dim, 1, MAX_FEATURE_DIM)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        num_kv_heads = check_size("num_kv_heads", num_kv_heads, 1, num_heads)
        if num_heads % num_kv_heads != 0:
            raise fail("num_kv_heads", f"a divisor of num_heads {num_heads}", num_kv_heads)
        head_dim = hidden_size // num_kv_heads if head_dim is None else head_dim
        head_dim = check_size("head_dim", head_dim, 1, MAX_HEAD_DIM)
        options = check_options(feature_map, layer_norm, scale, eps, layer_norm_eps, True, feature_dim)
        _, _, checked_scale, eps, layer_norm_eps, _ = options
        use_gamma, use_beta = check_bool("use_gamma", use_gamma), check_bool("use_beta", use_beta)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.feature_dim = feature_dim
        self.head_dim = head_dim
        self.feature_map = feature_map
        self.layer_norm = layer_norm
        self.scale = None if scale is None else checked_scale
        self.eps = eps
        self.layer_norm_eps = layer_norm_eps

        self.proj_q = nn.Linear(hidden_size, num_heads * feature_dim, bias=False)
        self.proj_k = nn.Linear(hidden_size, num_kv_heads * feature_dim, bias=False)
        self.proj_v = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.proj_o = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        norm = (feature_dim, layer_norm, layer_norm_eps, use_gamma, use_beta)
        self.ln_q = QueryKeyNorm(num_heads, *norm)
        self.ln_k = QueryKeyNorm(num_kv_heads, *norm)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, feature_dim={self.feature_dim}, "
            f"head_dim={self.head_dim}, feature_map={self.feature_map!r}, layer_norm={self.layer_norm!r}"
        )

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Causal attention of every token to itself and those before it.

        Args:
            x: (B, N, hidden_size), float32, float64, float16 or bfloat16.
            attention_mask: (B, N) bool or integers, nonzero for tokens, 0 for padding, on x's device. Padding
                may stand anywhere: the tokens of a row count as one sequence, as if nothing were between
                them. It is packed away inside with no synchronisation and no shape that depends on the mask.

        Returns:
            y (B, N, hidden_size), 0 at padding.

        Raises:
            ValueError, TypeError: x or attention_mask is not as above, or x is not in the weights' dtype
                (under autocast any dtype but float64 may meet any other) or not on their device.
        """
        return self._attend(x, attention_mask, False)[0]

    def prefill(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, RebasedState]:
        """`forward`, and the state to go on from with `step`: (y, state) with B sequences in the state.

        The state is float32 (float64 for float64). Gradients flow out of it; for decoding call this under
        torch.no_grad().
        """
        y, state = self._attend(x, attention_mask, True)
        assert state is not None
        return y, state

    def step(self, x_t: Tensor, state: RebasedState) -> Tensor:
        """One token more for each sequence.

        Args:
            x_t: (B, hidden_size).
            state: of B sequences, from `prefill`, or `RebasedState.zeros` for none; **updated in place**.

        Returns:
            y_t (B, hidden_size): what `forward` of the whole gives in its last row.

        Raises:
            ValueError, TypeError: x_t or the state has another shape or dtype; the state is untouched.
            RuntimeError: grad mode is on and x_t, the state or a parameter requires grad: call it under
                torch.no_grad().
        """
        _check_input("x_t", x_t, ("B", self.hidden_size))
        _refuse_gradients(self, x_t)
        y = rebased_attention_step(*self._heads(x_t, "x_t"), state, **self._options())
        output: Tensor = self.proj_o(y.flatten(1))
        return output

    def attention_matrix(self, x: Tensor) -> Tensor:
        """Where each token of x (B, N, hidden_size) attends: (B, num_heads, N, N), in O(N^2).

        See `rebased_cuda.attention_matrix`; times v it is what proj_o is applied to. Raises RuntimeError
        where the sequence is shared out over processes: no rank has all of it.
        """
        if self.context_parallel_group is not None:
            raise RuntimeError(
                "attention_matrix: needs the whole sequence, which context_parallelize shares out"
            )
        _check_input("x", x, ("B", "N", self.hidden_size))
        q, k, _ = self._sequences(x)
        return attention_matrix(q, k, **self._options())

    def _attend(
        self, x: Tensor, attention_mask: Tensor | None, return_state: bool
    ) -> tuple[Tensor, RebasedState | None]:
        options = {**self._options(), "return_state": return_state}
        packed, order, cu_seqlens = self._pack(x, attention_mask)
        if self.context_parallel_group is None:
            result = rebased_attention(*self._sequences(packed), **options, cu_seqlens=cu_seqlens)
        else:
            _refuse_mask(attention_mask)
            result = self._attend_over_ranks(x, options)
        y, state = result if isinstance(result, tuple) else (result, None)
        return self._unpack(y, order, x), state

    def _attend_over_ranks(self, x: Tensor, options: dict[str, Any]) -> Any:
        """The queries are projected while the state of the keys is on its way."""
        from .context_parallel import (
            begin_exchange,
            context_parallel_rebased_attention,
        )  # imports this module

        k, v = (x.transpose(1, 2) for x in self._keys_and_values(x))
        names = ("gamma_k", "beta_k", "feature_map", "layer_norm", "layer_norm_eps", "return_state")
        group = self.context_parallel_group
        exchange = begin_exchange(k, v, **{name: options[name] for name in names}, group=group)
        q = self._queries(x).transpose(1, 2)
        return context_parallel_rebased_attention(q, k, v, **options, group=group, exchange=exchange)

    def _queries(self, x: Tensor, name: str = "x") -> Tensor:
        """(..., num_heads, feature_dim) of x (..., hidden_size), which errors call `name`."""
        q: Tensor = _call(self.proj_q, x, name).unflatten(-1, (self.num_heads, self.feature_dim))
        return q

    def _keys_and_values(self, x: Tensor, name: str = "x") -> tuple[Tensor, Tensor]:
        """(..., num_kv_heads, feature_dim) and (..., num_kv_heads, head_dim) of x (..., hidden_size)."""
        return (
            _call(self.proj_k, x, name).unflatten(-1, (self.num_kv_heads, self.feature_dim)),
            _call(self.proj_v, x, name).unflatten(-1, (self.num_kv_heads, self.head_dim)),
        )

    def _heads(self, x: Tensor, name: str = "x") -> tuple[Tensor, Tensor, Tensor]:
        return self._queries(x, name), *self._keys_and_values(x, name)

    def _sequences(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, heads, N, ...) of x (B, N, hidden_size)."""
        q, k, v = self._heads(x)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _options(self) -> dict[str, Any]:
        gamma_q, beta_q = self._affine(self.ln_q, self.num_heads)
        gamma_k, beta_k = self._affine(self.ln_k, self.num_kv_heads)
        return {
            "gamma_q": gamma_q,
            "beta_q": beta_q,
            "gamma_k": gamma_k,
            "beta_k": beta_k,
            "feature_map": self.feature_map,
            "layer_norm": self.layer_norm,
            "scale": self.scale,
            "eps": self.eps,
            "layer_norm_eps": self.layer_norm_eps,
        }

    def _affine(self, norm: nn.LayerNorm, heads: int) -> tuple[Tensor | None, Tensor | None]:
        """gamma and beta (heads, feature_dim) of ln_q or ln_k, or of what was put in their place."""
        if type(norm).forward is nn.LayerNorm.forward:  # which cannot give them
            gamma, beta = norm.weight, norm.bias
        else:
            gamma, beta = norm(None)
        sizes = (heads, self.feature_dim)
        return None if gamma is None else gamma.view(sizes), None if beta is None else beta.view(sizes)

    def _pack(self, x: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(x, None, None), or x (1, B N, hidden_size) with all padding last, its order, cu_seqlens (B + 1,).

        The rows behind the last sequence are in none, so the op gives y = 0 there.
        """
        _check_input("x", x, ("B", "N", self.hidden_size))
        if attention_mask is None:
            return x, None, None
        tokens = _tokens(attention_mask, "x", x)
        order = tokens.logical_not().flatten().to(torch.uint8).argsort(stable=True)
        cu_seqlens = nn.functional.pad(tokens.sum(1).cumsum(0), (1, 0))
        # whatever stands at padding, NaN too, must not reach the projections' gradients
        x = x.masked_fill(tokens.logical_not().unsqueeze(-1), 0)
        return x.flatten(0, 1).index_select(0, order).unsqueeze(0), order, cu_seqlens

    def _unpack(self, y: Tensor, order: Tensor | None, x: Tensor) -> Tensor:
        """The layer's output of y (B, num_heads, N, head_dim), each row back where x has it."""
        output: Tensor = self.proj_o(y.transpose(1, 2).flatten(2))
        if order is not None:
            output = torch.empty_like(output[0]).index_copy(0, order, output[0]).view(x.shape)
        return output


class GatedShortConvolution(_ContextParallelLayer):
    """y = u + conv(u) * proj(u): what a token and the few before it say, without attention.

    conv is a causal depthwise convolution over time with bias, proj a Linear with bias. State-dict names:
    conv.weight (hidden_size, 1, kernel_size), conv.bias, proj.weight, proj.bias.

    Args:
        hidden_size: width of u.
        kernel_size: how many tokens the convolution sees, the present one included.

    Raises:
        ValueError, TypeError: a size is not an integer of at least 1; the message names it.
    """

    def __init__(self, hidden_size: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.hidden_size = hidden_size = check_size("hidden_size", hidden_size, 1)
        self.kernel_size = kernel_size = check_size("kernel_size", kernel_size, 1)
        self.conv = nn.Conv1d(hidden_size, hidden_size, kernel_size, groups=hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, u: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """y (B, N, hidden_size) of u (B, N, hidden_size); attention_mask as in `ReBasedAttention.forward`."""
        return self.prefill(u, attention_mask)[0]

    def prefill(self, u: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`forward`, and the cache to go on from: (B, hidden_size, kernel_size - 1), the last tokens of u.

        Raises:
            ValueError, TypeError: u or attention_mask has another shape or dtype, or u is not in the weights'
                dtype (except under autocast) or on their device.
        """
        _check_input("u", u, ("B", "N", self.hidden_size))
        if self.context_parallel_group is not None:
            from ._halo import Halo  # only where torch.distributed is in use

            _refuse_mask(attention_mask)
            before, after = Halo.apply(  # type: ignore[no-untyped-call]
                u, self.kernel_size - 1, self.context_parallel_group
            )
            return self._convolve(u, before.mT)[0], after.mT.contiguous()
        if attention_mask is None:
            return self._convolve(u)
        # padding goes to the front of each row, as the zeros that stand before a sequence anyway
        tokens = _tokens(attention_mask, "u", u)
        padding = tokens.logical_not().unsqueeze(-1)
        order = tokens.to(torch.uint8).argsort(dim=1, stable=True).unsqueeze(-1).expand(u.shape)
        y, cache = self._convolve(u.masked_fill(padding, 0).gather(1, order))
        return torch.empty_like(y).scatter(1, order, y).masked_fill(padding, 0), cache

    def step(self, u_t: Tensor, cache: Tensor) -> Tensor:
        """One token more: u_t (B, hidden_size) -> y_t (B, hidden_size); `cache` is **updated in place**.

        Args:
            u_t: (B, hidden_size).
            cache: (B, hidden_size, kernel_size - 1) in u_t's dtype, from `prefill`, or zeros where nothing
                came before. Any strides, but each element in memory of its own, apart from u_t's.

        Raises:
            ValueError, TypeError: u_t or the cache is not as above; the cache is untouched.
            RuntimeError: grad mode is on and u_t, the cache or a parameter requires grad: call it under
                torch.no_grad(). Or the cache was made under torch.inference_mode(), and this is outside.
        """
        _check_input("u_t", u_t, ("B", self.hidden_size))
        _check_tensor("cache", cache, (u_t.shape[0], self.hidden_size, self.kernel_size - 1))
        if cache.dtype != u_t.dtype:
            raise TypeError(f"cache: expected u_t's dtype {u_t.dtype}, got {cache.dtype}")
        if cache.device != u_t.device:
            raise fail("cache", f"u_t's device {u_t.device}", cache.device)
        _refuse_gradients(self, u_t, cache)
        if not torch.compiler.is_compiling() and not torch._C._is_tracing():  # which know no memory
            _check_writable("cache", cache, "u_t", u_t)
        y, last = self._convolve(u_t.unsqueeze(1), cache, "u_t")
        cache.copy_(last)
        return y.squeeze(1)

    def _convolve(self, u: Tensor, before: Tensor | None = None, name: str = "u") -> tuple[Tensor, Tensor]:
        """y of u (B, N, hidden_size) after the tokens `before` (a cache, or None: zeros); the next cache."""
        if before is None:
            before = u.new_zeros(u.shape[0], self.hidden_size, self.kernel_size - 1)
        window = torch.cat([before, u.transpose(1, 2)], -1)  # (B, hidden_size, kernel_size - 1 + N)
        cache = window[..., u.shape[1] :].contiguous()
        if untraced(
            _fits, u, ("B", 0, self.hidden_size)
        ):  # nn.Conv1d refuses a window shorter than its kernel
            window = nn.functional.pad(window, (0, 1))
        convolved = _call(self.conv, window, name)[..., : u.shape[1]].transpose(1, 2)
        return u + convolved * _call(self.proj, u, name), cache


def _refuse_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError(
            "attention_mask: not supported under context parallelism, where a row's tokens lie on several "
            "ranks; pad every row behind its tokens and leave the mask out, or pack them and call "
            "context_parallel_rebased_attention with cu_seqlens"
        )


def _refuse_gradients(layer: nn.Module, *tensors: Tensor) -> None:
    if not torch.is_grad_enabled():  # first: to list the parameters takes as long as a Linear of one token
        return
    if any(x.requires_grad for x in (*tensors, *layer.parameters())):
        raise RuntimeError(f"{type(layer).__name__}.step is for inference: call it under torch.no_grad().")


def _call(module: nn.Linear | nn.Conv1d, x: Tensor, name: str) -> Any:
    """module(x), where an error that lies in x names it.

    x and the weight are compared only after the call has failed: until then hooks may still bring them
    together, as offloading and mixed precision do.
    """
    if x.is_meta and not module.weight.is_meta:  # which a Linear may take without a word
        raise fail(name, f"the weights' device {module.weight.device}", x.device)
    try:
        return module(x)
    except RuntimeError:
        weight = module.weight
        if weight.dtype in _DTYPES and _multiplied_in(x) != _multiplied_in(weight):
            raise TypeError(f"{name}: expected the weights' dtype {weight.dtype}, got {x.dtype}") from None
        if not weight.is_meta and x.device != weight.device:
            raise fail(name, f"the weights' device {weight.device}", x.device) from None
        raise


def _multiplied_in(x: Tensor) -> torch.dtype:
    """The dtype in which products take x: its own, or autocast's."""
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _check_tensor(name: str, x: Tensor, shape: tuple[int | str, ...]) -> None:
    """A dense tensor; sizes given as a number must be met, those given as a letter may be any."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    check_layout(name, x)  # before its shape, which a nested tensor has not
    if not untraced(_fits, x, shape):
        raise fail(name, f"shape ({', '.join(str(size) for size in shape)})", tuple(x.shape))
    check_memory(name, x)


def _fits(x: Tensor, shape: tuple[int | str, ...]) -> bool:
    return x.dim() == len(shape) and all(
        isinstance(size, str) or size == given for size, given in zip(shape, x.shape, strict=True)
    )


def _check_input(name: str, x: Tensor, shape: tuple[int | str, ...]) -> None:
    _check_tensor(name, x, shape)
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected dtype float32, float64, float16 or bfloat16, got {x.dtype}")


def _check_writable(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """That writing to x does what it says, and nothing to `other` (of the same dtype and device)."""
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
    if type(x) is Tensor and type(other) is Tensor and _share_memory(x, other):  # a subclass may have none
        raise ValueError(f"{name}: expected memory apart from {other_name}'s, since it is updated in place")


def _share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether an element of x is one of y; both of the same dtype, neither empty."""

    def end(x: Tensor) -> int:
        last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
        return x.data_ptr() + (last + 1) * x.element_size()

    def addresses(x: Tensor) -> Tensor:
        result = torch.tensor(x.data_ptr(), device="cpu")
        for stride, size in zip(x.stride(), x.shape, strict=True):
            steps = torch.arange(size, device="cpu") * (stride * x.element_size())
            result = result.unsqueeze(-1) + steps
        return result

    if x.data_ptr() >= end(y) or y.data_ptr() >= end(x):  # as good as always
        return False
    return bool(torch.isin(addresses(x), addresses(y)).any())


def _tokens(attention_mask: Tensor, name: str, x: Tensor) -> Tensor:
    """The mask as bool (B, N): True for tokens."""
    _check_tensor("attention_mask", attention_mask, tuple(x.shape[:2]))
    if attention_mask.device != x.device:
        raise fail("attention_mask", f"{name}'s device {x.device}", attention_mask.device)
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(f"attention_mask: expected bool or an integer dtype, got {attention_mask.dtype}")
    return attention_mask != 0
