"""ReBased linear attention for PyTorch, as one fused op with hand-written CUDA and CPU kernels.

`rebased_attention` is the op, `rebased_attention_step` its one-token decode step, `RebasedState` what a
sequence leaves behind; `ReBasedAttention` and `GatedShortConvolution` are layers; `rebased_cuda.reference` is
the same maths in plain torch, the judge of every backend, and `attention_matrix` its matrix of who attends to
whom. `build_info()` says what this build contains, `explain` which CUDA kernels a call would take, and why.
`rebased_cuda.context_parallel` spreads a sequence over processes, `rebased_cuda.models` has language models
for transformers, `rebased_cuda.compat` other packages' calls, and `rebased_cuda.testing` tells and forces how
the CUDA kernels are launched.
"""

import torch  # first: loads the libtorch_cpu that the operators' symbols are found in

from ._load import build_info
from .attention import rebased_attention, rebased_attention_step
from .explanation import DeviceLimits, explain
from .layers import GatedShortConvolution, ReBasedAttention
from .reference import attention_matrix
from .state import RebasedState

__version__ = "0.1.0"
__all__ = [
    "DeviceLimits",
    "GatedShortConvolution",
    "ReBasedAttention",
    "RebasedState",
    "attention_matrix",
    "build_info",
    "explain",
    "rebased_attention",
    "rebased_attention_step",
]
del torch
