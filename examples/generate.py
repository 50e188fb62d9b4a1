"""Writes text with a model of train_lm.py or finetune_lora.py, or any causal language model of this package.

    python examples/generate.py --prompt "class Queue:"

Text appears as it is generated. The model goes on from a state of one size: what it remembers of a long text
takes no more memory than of a short one, and a token no more time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import rebased_cuda.models  # noqa: F401 - tells transformers' Auto classes of the models


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval().to(options.device)
    # every file that the model has seen began with this token
    tokens = tokenizer(tokenizer.bos_token + options.prompt, return_tensors="pt").input_ids.to(options.device)
    start = time.perf_counter()
    output = model.generate(
        tokens,
        max_new_tokens=options.tokens,
        do_sample=options.temperature > 0,
        temperature=options.temperature or None,
        top_p=options.top_p if options.temperature > 0 else None,
        eos_token_id=None,  # a file may end, and another begin
        pad_token_id=tokenizer.eos_token_id,
        return_dict_in_generate=True,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )
    seconds = time.perf_counter() - start
    count = output.sequences.shape[1] - tokens.shape[1]
    states = [x for layer in output.cache.layers for x in layer.recurrent_states.values() if x is not None]
    size = sum(x.numel() * x.element_size() for x in states)
    print(
        f"\n{count} tokens in {seconds:.1f} s: {count / seconds:.0f} tokens a second, "
        f"from a state of {size / 1e3:.0f} kB, whatever the length"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("python-lm"),
        help="folder of a model and its tokenizer, or of an adapter (default: python-lm)",
    )
    parser.add_argument("--prompt", default="import ", help="what the text begins with (default: 'import ')")
    parser.add_argument("--tokens", type=int, default=300, help="how many to generate (default: 300)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        help="the higher, the bolder; 0 takes the likeliest (default: 0.7)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        help="draw among the likeliest tokens with this probability in all (default: 0.95)",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text (default: 0)")
    parser.add_argument(
        "--device", default="cpu", help="cpu, or cuda where the package is built for it (default: cpu)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
