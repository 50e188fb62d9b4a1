"""GatedShortConvolution: what a token and the few before it say."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import fail, untraced
from ..state import check_size
from .base import (
    ContextParallelLayer,
    call,
    check_input,
    check_shape,
    check_writable,
    fits,
    refuse_gradients,
    refuse_mask,
    token_mask,
)


class GatedShortConvolution(ContextParallelLayer):
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
        check_input("u", u, ("B", "N", self.hidden_size))
        if self.context_parallel_group is not None:
            from ..context_parallel.halo import Halo  # only where torch.distributed is in use

            refuse_mask(attention_mask)
            before, after = Halo.apply(  # type: ignore[no-untyped-call]
                u, self.kernel_size - 1, self.context_parallel_group
            )
            return self._convolve(u, before.mT)[0], after.mT.contiguous()
        if attention_mask is None:
            return self._convolve(u)
        # padding goes to the front of each row, as the zeros that stand before a sequence anyway
        tokens = token_mask(attention_mask, "u", u)
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
        check_input("u_t", u_t, ("B", self.hidden_size))
        check_shape("cache", cache, (u_t.shape[0], self.hidden_size, self.kernel_size - 1))
        if cache.dtype != u_t.dtype:
            raise TypeError(f"cache: expected u_t's dtype {u_t.dtype}, got {cache.dtype}")
        if cache.device != u_t.device:
            raise fail("cache", f"u_t's device {u_t.device}", cache.device)
        refuse_gradients(self, u_t, cache)
        if not torch.compiler.is_compiling() and not torch._C._is_tracing():  # which know no memory
            check_writable("cache", cache, "u_t", u_t)
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
            fits, u, ("B", 0, self.hidden_size)
        ):  # nn.Conv1d refuses a window shorter than its kernel
            window = nn.functional.pad(window, (0, 1))
        convolved = call(self.conv, window, name)[..., : u.shape[1]].transpose(1, 2)
        return u + convolved * call(self.proj, u, name), cache
