"""The two layers of the authors' hybrid: a gated short convolution first, then ReBased attention.

Both have `forward` for training, `prefill` and `step` for decoding: prefill reads a prompt and gives what the
layer remembers of it, its state, and step takes one token more and updates that in place. forward and prefill
go on from a state too, with any number of tokens, and take padded rows (attention_mask) or packed sequences
(cu_seqlens); with state_index, prefill and step find the states in slots of a pool.
"""

from .attention import QueryKeyNorm, ReBasedAttention
from .convolution import GatedShortConvolution

__all__ = ["GatedShortConvolution", "QueryKeyNorm", "ReBasedAttention"]
