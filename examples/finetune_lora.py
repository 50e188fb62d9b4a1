"""Teaches a model of train_lm.py, which knows Python's sources, Python's documentation: by LoRA adapters.

    python examples/train_lm.py
    python examples/finetune_lora.py                        # writes the folder python-lm-docs
    python examples/generate.py --model python-lm-docs --prompt "The "

The text is what `help()` shows of the language reference, which every Python ships. PEFT puts a pair of small
matrices beside each projection; these alone are trained and saved, and the model's own weights stay.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import rebased_cuda.models  # noqa: F401 - tells transformers' Auto classes of the models


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model)
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]

    def rows(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer("".join(tokenizer.bos_token + text for text in texts), return_tensors="pt")
        return tokens.input_ids[0].unfold(0, options.context, options.context)

    training = rows([text for index, text in enumerate(topics) if index % 10])
    held_out = rows(topics[::10])[:32]
    size = sum(len(tokenizer.decode(row).encode()) for row in held_out)

    # the names of a layer's projections, and of its MLP
    targets = ["proj_q", "proj_k", "proj_v", "proj_o", "fc1", "fc2"]
    model = get_peft_model(
        base,
        LoraConfig(
            task_type="CAUSAL_LM", r=options.rank, lora_alpha=2 * options.rank, target_modules=targets
        ),
    )
    trained = [x for x in model.parameters() if x.requires_grad]
    count, whole = sum(x.numel() for x in trained), sum(x.numel() for x in model.parameters())
    print(f"{len(training)} rows of documentation; {count} of {whole} parameters are trained")

    @torch.no_grad()
    def bits() -> float:
        """Of the held-out documentation, for each byte."""
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in held_out]
        return sum(losses) * (options.context - 1) / math.log(2) / size

    before = bits()
    print(f"before: {before:.2f} bits a byte of held-out documentation", flush=True)
    optimizer = torch.optim.Adam(trained, lr=options.learning_rate)
    order = torch.randperm(len(training))
    start = time.monotonic()
    for step in range(options.steps):
        at = torch.arange(step * options.batch, (step + 1) * options.batch) % len(order)
        batch = training[order[at]]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % max(options.steps // 5, 1) == 0:
            seconds = time.monotonic() - start
            print(
                f"  step {step + 1} of {options.steps}, {seconds:.0f} s: loss {loss.item():.3f}", flush=True
            )
    after = bits()
    print(f"after:  {after:.2f} bits a byte of held-out documentation")
    with model.disable_adapter():
        print(f"without the adapters again: {bits():.2f}")
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    size = sum(file.stat().st_size for file in options.output.glob("adapter_model*"))
    print(
        f"saved the adapters in {options.output}, {size / 1e3:.0f} kB; generate.py --model {options.output}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("python-lm"),
        help="folder that train_lm.py made (default: python-lm)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("python-lm-docs"),
        help="folder for the adapters (default: python-lm-docs)",
    )
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: 60)")
    parser.add_argument("--batch", type=int, default=4, help="rows in a step (default: 4)")
    parser.add_argument("--context", type=int, default=256, help="tokens in a row (default: 256)")
    parser.add_argument("--rank", type=int, default=8, help="of the small matrices (default: 8)")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="(default: 0.004)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
