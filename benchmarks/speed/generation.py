"""`python -m benchmarks.speed.generation`: what a token costs a model that goes on from its states, on a CPU.

Two questions, of the paper's ReBased model of 18 layers where no other is named:

* How many times longer do the tokens after a prompt take where each is computed from the whole text again?
  A forward of the shortest and of the longest text is timed: its time is linear in the length.
* Which share of a step at batch 1 do the step operators and the short convolutions have? Steps with and
  without them take turns: without, the operator answers with v, and a convolution with its input, after its
  projection, which stays.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from rebased_cuda import GatedShortConvolution
from rebased_cuda.layers import attention
from rebased_cuda.models import NAMED, RebasedConfig, RebasedForCausalLM

WARM_UP = 5


class Seconds(NamedTuple):
    prefill: float  # of the prompt, once
    step: float  # median
    bare_step: float  # median of steps without the operators and convolutions
    recomputed: tuple[float, float]  # a forward of the prompt, and of the prompt and all tokens


def _identity(q: Tensor, k: Tensor, v: Tensor, state: Any, **_: Any) -> Tensor:
    """What stands for the step operator: of the right shape, and nothing computed."""
    return v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def _projected(self: GatedShortConvolution, u_t: Tensor, state: Any, **_: Any) -> Tensor:
    self.proj(u_t)
    return u_t


@contextlib.contextmanager
def without_mixing() -> Iterator[None]:
    with (
        mock.patch.object(attention, "rebased_attention_step", _identity),
        mock.patch.object(GatedShortConvolution, "step", _projected),
    ):
        yield


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def measure(model: RebasedForCausalLM, prompt: int, tokens: int, rounds: int) -> Seconds:
    ids = torch.randint(model.config.vocab_size, (1, prompt + tokens))

    def read(length: int, use_cache: bool) -> Any:
        return model(ids[:, :length], use_cache=use_cache, logits_to_keep=1)

    cache = read(prompt, True).cache

    def step() -> None:
        model(ids[:, prompt : prompt + 1], cache=cache)

    for _ in range(WARM_UP):
        step()
    with_all, without = [], []
    for _ in range(rounds):
        with_all.append(_seconds(step))
        with without_mixing():
            without.append(_seconds(step))
    short, long = (
        min(_seconds(lambda n=n: read(n, False)) for _ in range(2)) for n in (prompt, prompt + tokens)
    )
    return Seconds(
        _seconds(lambda: read(prompt, True)),
        statistics.median(with_all),
        statistics.median(without),
        (short, long),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=list(NAMED), default="rebased-157m")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of it (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="after the prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=60, help="steps of each kind (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    model = RebasedForCausalLM(RebasedConfig.named(options.model)).eval()
    seconds = measure(model, options.prompt, options.tokens, options.rounds)
    stepped = seconds.prefill + (options.tokens - 1) * seconds.step
    again = options.tokens * sum(seconds.recomputed) / 2
    share = 1 - seconds.bare_step / seconds.step
    print(
        f"{options.model}, {torch.get_num_threads()} threads: {options.tokens} tokens after {options.prompt} "
        f"from states {stepped:.1f} s, each computed again {again:.1f} s, {again / stepped:.0f} times as long"
    )
    print(f"a step {1e3 * seconds.step:.1f} ms, {share:.0%} of it step operators and convolutions")


if __name__ == "__main__":
    main()
