"""Serves many requests at once from a pool of states: continuous batching.

    python examples/serve.py                       # the paper's 18 x 768 model, untrained: about a minute
    python examples/serve.py --model python-lm     # a model that train_lm.py made, whose texts can be read

A request takes a free slot of the pool, which is emptied for it. Each step of the model makes one token more
for every request that has a slot, and reads the prompts of newcomers. A request that is done leaves, and the
next one takes its slot while the others go on. Then every request is served again, alone, and the texts must
be the same.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rebased_cuda import ReBasedAttention, RebasedState
from rebased_cuda.models import NAMED, RebasedConfig, RebasedForCausalLM

PROMPTS = ("import ", "def read(path):\n", "class Queue:\n", "    return ", "for line in ", '"""Returns ')
TIE = 1e-3  # two candidates whose scores are as close as that may change places by rounding


@dataclass
class Request:
    """A prompt, how many tokens are wanted, and what was said so far."""

    number: int
    prompt: list[int]
    wanted: int
    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    """By how much each token was ahead of the second best."""

    def __post_init__(self) -> None:
        self.dice = torch.Generator().manual_seed(self.number)  # its own: others must not change its text

    @property
    def unread(self) -> list[int]:
        """What the model has not seen: the prompt, or the last token said."""
        return self.tokens[-1:] or self.prompt

    @property
    def seen(self) -> int:
        return len(self.prompt) + len(self.tokens) - 1 if self.tokens else 0

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.wanted


class Pool:
    """The states of `slots` sequences, of every layer of a model, and how the model goes on from them."""

    def __init__(self, model: RebasedForCausalLM, slots: int) -> None:
        self.model = model
        self.states = [self._zeros(block.mixer, slots) for block in model.model.layers]

    def _zeros(self, mixer: nn.Module, slots: int) -> Any:
        device = self.model.device
        if isinstance(mixer, ReBasedAttention):
            sizes = (slots, mixer.num_kv_heads, mixer.feature_dim, mixer.head_dim)
            return RebasedState.zeros(*sizes, feature_map=mixer.feature_map, device=device)
        # a token's entries side by side in memory, which the convolution reads fastest
        return torch.zeros(slots, mixer.kernel_size - 1, mixer.hidden_size, device=device).mT

    def empty(self, slot: int) -> None:
        """Forgets the sequence of a slot, for the next one."""
        for state in self.states:
            for part in state if isinstance(state, RebasedState) else (state,):
                part[slot] = 0

    def read(self, tokens: Sequence[list[int]], seen: Sequence[int], slots: list[int]) -> Tensor:
        """More tokens for each of the slots, which have seen so many before: logits (slots, vocabulary).

        All tokens lie packed in one row, prompts beside the next tokens of other slots, so that the weights
        come from memory once.
        """
        device = self.model.device
        index = torch.tensor(slots, device=device)
        bounds = torch.tensor([0, *map(len, tokens)], device=device).cumsum(0)
        row = torch.tensor([[token for piece in tokens for token in piece]], device=device)
        pieces = zip(seen, tokens, strict=True)
        positions = torch.cat([torch.arange(first, first + len(piece)) for first, piece in pieces])

        def mix(mixer: Any, x: Tensor, state: Any) -> Tensor:
            if x.shape[1] == len(slots):
                return mixer.step(x.squeeze(0), state, state_index=index).unsqueeze(0)
            return mixer.prefill(x, state=state, cu_seqlens=bounds, state_index=index)[0]

        return self._logits(row, positions.to(device), mix, bounds[1:] - 1)

    def _logits(self, tokens: Tensor, positions: Tensor, mix: Callable[..., Tensor], rows: Any) -> Tensor:
        """The model of tokens (1, N), with the mixers called as `mix` does; logits of some rows."""
        decoder = self.model.model
        x = decoder.embed_tokens(tokens)
        if decoder.embed_positions is not None:
            x = x + decoder.embed_positions(positions)
        for block, state in zip(decoder.layers, self.states, strict=True):
            x = x + mix(block.mixer, block.mixer_norm(x), state)
            x = x + block.mlp(block.mlp_norm(x))
        return self.model.lm_head(decoder.norm(x[0, rows]))


@torch.no_grad()
def pack_weights(model: nn.Module, rows: int) -> None:
    """Gives the Linears of a float32 model on the CPU a copy of their weights in oneDNN's order.

    F.linear of a few rows takes two to three times as long as that product. torch.compile calls the same two
    operators where it may freeze the weights, but takes minutes for a model.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.is_cpu and module.weight.dtype == torch.float32:
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight, rows)
            module.forward = partial(_packed_product, packed, module.bias)


def _packed_product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.inference_mode()
def serve(
    model: RebasedForCausalLM,
    requests: Sequence[Request],
    slots: int,
    temperature: float,
    say: Callable[[str], None] = lambda line: None,
) -> float:
    """Serves the requests, in their order, from a pool of so many slots; returns the seconds that it took."""
    start = time.perf_counter()
    pool, waiting = Pool(model, slots), deque(requests)
    free, active = list(range(slots)), dict[int, Request]()
    while waiting or active:
        while free and waiting:
            slot = free.pop(0)
            active[slot] = waiting.popleft()
            pool.empty(slot)
            say(f"request {active[slot].number} takes slot {slot}")
        current = list(active.values())
        logits = pool.read([x.unread for x in current], [x.seen for x in current], list(active))
        choose(logits, current, temperature)
        for slot, request in list(active.items()):
            if request.done:
                del active[slot]
                free.append(slot)
                say(f"request {request.number} leaves slot {slot}, {request.wanted} tokens")
    return time.perf_counter() - start


def choose(logits: Tensor, requests: Sequence[Request], temperature: float) -> None:
    """Draws the next token of each request by the Gumbel trick, with the request's own dice."""
    noise = torch.empty(logits.shape)
    for row, request in zip(noise, requests, strict=True):
        row.uniform_(generator=request.dice)
    noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_().neg_().log_()  # of uniform numbers: minus Gumbel's
    scores = logits.cpu().float() - temperature * noise
    best = scores.topk(2)
    for request, tokens, values in zip(requests, best.indices.tolist(), best.values.tolist(), strict=True):
        request.tokens.append(tokens[0])
        request.margins.append(values[0] - values[1])


def same(one: Request, other: Request) -> bool:
    """Whether two texts are equal, or part where two candidates tie."""
    for index, (mine, theirs) in enumerate(zip(one.tokens, other.tokens, strict=True)):
        if mine != theirs:
            return max(one.margins[index], other.margins[index]) < TIE
    return True


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.manual_seed(0)
    if options.model in NAMED:
        model, tokenizer = RebasedForCausalLM(RebasedConfig.named(options.model)), None
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    if "full_attention" in model.config.layer_types:
        raise SystemExit("--model: expected one without softmax attention, whose cache grows")
    model = model.to(options.device).eval()
    pack_weights(model, options.slots)
    print(
        f"{options.model}: {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{options.requests} requests, {options.slots} slots"
    )

    def queue() -> list[Request]:
        random = torch.Generator().manual_seed(1)
        made = []
        for number in range(options.requests):
            wanted = torch.randint(options.tokens // 2, options.tokens + 1, (), generator=random)
            if tokenizer is None:
                prompt = torch.randint(model.config.vocab_size, (options.prompt,), generator=random).tolist()
            else:
                prompt = tokenizer(tokenizer.bos_token + PROMPTS[number % len(PROMPTS)])["input_ids"]
            made.append(Request(number, prompt, int(wanted)))
        return made

    def text(request: Request) -> str:
        if tokenizer is None:
            return " ".join(map(str, request.tokens[:10])) + " ..."
        return repr(tokenizer.decode(request.prompt[1:] + request.tokens))

    warm = Request(-1, [0], 2)
    serve(model, [warm], 1, options.temperature)  # the first call of anything takes longer
    start = time.perf_counter()
    together = queue()
    count = sum(request.wanted for request in together)
    seconds = serve(
        model,
        together,
        options.slots,
        options.temperature,
        lambda line: print(f"  {time.perf_counter() - start:6.2f} s  {line}", flush=True),
    )
    for request in together:
        print(f"  {request.number}: {text(request)}")
    print(f"{options.slots} slots: {count} tokens in {seconds:.1f} s, {count / seconds:.1f} a second")
    print("the same requests, each alone ...", flush=True)
    alone = queue()
    seconds_alone = sum(serve(model, [request], 1, options.temperature) for request in alone)
    print(f"1 slot: {count} tokens in {seconds_alone:.1f} s, {count / seconds_alone:.1f} a second")
    equal = sum(map(same, together, alone))
    print(
        f"{options.slots} slots serve {seconds_alone / seconds:.1f} times the tokens a second of one; "
        f"{equal} of {len(alone)} texts equal to serving them alone"
    )
    if equal < len(alone):
        raise SystemExit("FAILED: a text depends on what else was served")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="rebased-157m",
        help="folder of a model and its tokenizer, or the name of one of the paper's models, which is then "
        "untrained and talks in numbers of tokens (default: rebased-157m)",
    )
    parser.add_argument("--slots", type=int, default=8, help="sequences at a time (default: 8)")
    parser.add_argument("--requests", type=int, default=40, help="how many come (default: 40)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=32,
        help="most tokens that a request wants; it wants at least half of them (default: 32)",
    )
    parser.add_argument(
        "--prompt", type=int, default=8, help="tokens of the prompts of an untrained model (default: 8)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)"
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu, or cuda where the package is built for it (default: cpu)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
