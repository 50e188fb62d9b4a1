"""Seconds per training step of one and the same loop, with the native op and with plain PyTorch in its place.

Plain PyTorch is the chunked form as fast as it could be made (rebased_cuda/demo/baselines.py: a loop over
chunks or a cumulative sum, the chunk's length tried out at every N) and as readable as it could be made
(`rebased_cuda.reference.chunked`). All three train the same model from the same weights on the same rows; the
mixers' first gradients are compared before anything is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rebased_cuda import ReBasedAttention, reference
from rebased_cuda.demo import baselines, timing
from rebased_cuda.models import RebasedForCausalLM

from . import text
from .parallel import OneProcess
from .sizes import ModelConfiguration, logits_of
from .train import Trainer, TrainingConfiguration

LENGTHS = (128, 512, 2048)
NATIVE = "native op"
REFERENCE = "plain, reference.chunked"
TOLERANCE = 1e-3  # relative L2 error of the first gradients, in float32

Attend = Callable[..., Tensor]


class PlainAttention(nn.Module):
    """A ReBasedAttention whose op is `attend`: q, k (B, N, H*d), v (B, N, H*dv), affine -> (B, H, N, dv)."""

    def __init__(self, layer: ReBasedAttention, attend: Attend) -> None:
        super().__init__()
        self.layer, self.attend = layer, attend

    def forward(self, x: Tensor, attention_mask: None = None, cu_seqlens: None = None) -> Tensor:
        layer = self.layer
        affine = (layer.ln_q.weight, layer.ln_q.bias, layer.ln_k.weight, layer.ln_k.bias)
        affine = tuple(parameter.view(layer.num_heads, layer.feature_dim) for parameter in affine)
        y = self.attend(layer.proj_q(x), layer.proj_k(x), layer.proj_v(x), *affine)
        output: Tensor = layer.proj_o(y.transpose(1, 2).flatten(2))
        return output


def reference_chunked(q: Tensor, k: Tensor, v: Tensor, *affine: Tensor) -> Tensor:
    heads = affine[0].shape[0]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    y = reference.chunked(q, k, v, *affine, layer_norm="token", eps=baselines.EPS)
    assert isinstance(y, Tensor)
    return y


def forms(seqlen: int) -> Iterator[tuple[str, Attend]]:
    """The plain forms worth trying at a length."""
    chunks = [chunk for chunk in baselines.CHUNKS if chunk <= seqlen]
    for chunk in chunks:
        yield f"plain, loop over chunks of {chunk}", partial(baselines.chunked_loop, chunk=chunk)
        yield f"plain, cumsum of chunks of {chunk}", partial(baselines.chunked_cumsum, chunk=chunk)


def adapt(model: nn.Module, attend: Attend | None) -> None:
    """The baselines' eps in every ReBased layer, and their arithmetic where `attend` is given."""
    assert isinstance(model, RebasedForCausalLM)
    for block in model.model.layers:
        if isinstance(block.mixer, ReBasedAttention):
            block.mixer.eps = baselines.EPS
            if attend is not None:
                block.mixer = PlainAttention(block.mixer, attend)


def mixer_gradients(trainer: Trainer) -> Tensor:
    """Of the first batch's loss with respect to all parameters of the ReBased layers, in one row."""
    shape, model = trainer.configuration, trainer.model
    rows = text.batch(trainer.stream, 0, shape.seed, shape.batch, shape.context).to(trainer.processes.device)
    loss = F.cross_entropy(logits_of(model, rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    mixers = (block.mixer for block in model.model.layers)
    chosen = [mixer for mixer in mixers if isinstance(mixer, ReBasedAttention | PlainAttention)]
    parameters = [parameter for mixer in chosen for parameter in mixer.parameters()]
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss, parameters)])


@dataclass(frozen=True)
class Timing:
    """Seconds a step; `plain` is the fastest of the plain forms, `ratio` its time over the native op's."""

    seqlen: int
    batch: int
    native: float
    plain: float
    plain_name: str
    reference: float
    ratio: float
    reference_ratio: float


def measure(
    model: ModelConfiguration,
    training: TrainingConfiguration,
    stream: Tensor,
    device: torch.device,
    rounds: int,
    lengths: tuple[int, ...] = LENGTHS,
    tokens: int = 2048,
) -> Iterator[Timing]:
    """For every length N, with batches of `tokens` tokens (at least one row).

    Raises:
        RuntimeError: a plain form does not compute what the native op does.
    """
    for seqlen in lengths:
        shape = replace(training, context=seqlen, batch=max(tokens // seqlen, 1), accumulate=1)

        def make(attend: Attend | None, shape: TrainingConfiguration = shape) -> Trainer:
            return Trainer(model, shape, stream, OneProcess(device), partial(adapt, attend=attend))

        trainers = {NATIVE: make(None), REFERENCE: make(reference_chunked)}
        trainers |= {name: make(attend) for name, attend in forms(seqlen)}
        expected = mixer_gradients(trainers[NATIVE])
        for name, trainer in trainers.items():
            error = timing.relative_error(mixer_gradients(trainer), expected)
            if not error <= TOLERANCE:
                raise RuntimeError(f"N {seqlen}: the gradients of {name} are {error:.1e} off the native op's")
            trainer.step()  # warms up
        plain = [name for name in trainers if name not in (NATIVE, REFERENCE)]
        tried = timing.interleave({name: trainers[name].step for name in plain}, 2, device.type)
        best = min(plain, key=lambda name: min(tried[name]))
        methods = {name: trainers[name].step for name in (NATIVE, best, REFERENCE)}
        seconds = timing.interleave(methods, rounds, device.type)
        yield Timing(
            seqlen,
            shape.batch,
            statistics.median(seconds[NATIVE]),
            statistics.median(seconds[best]),
            best,
            statistics.median(seconds[REFERENCE]),
            timing.ratio(seconds[best], seconds[NATIVE]),
            timing.ratio(seconds[REFERENCE], seconds[NATIVE]),
        )
