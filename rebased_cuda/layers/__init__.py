"""The two layers of the authors' hybrid: a gated short convolution first, then ReBased attention.

Both have `forward` for training, `prefill` and `step` for decoding: prefill reads a prompt and gives what the
layer remembers of it, step takes one token more and updates that in place.
"""

from .attention import QueryKeyNorm, ReBasedAttention
from .convolution import GatedShortConvolution

__all__ = ["GatedShortConvolution", "QueryKeyNorm", "ReBasedAttention"]
