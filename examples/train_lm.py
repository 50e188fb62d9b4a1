"""Trains a small language model of ReBased layers on text that every machine with Python has.

    python examples/train_lm.py                # about two minutes on two cores; writes the folder python-lm
    python examples/generate.py

By default the text is the source code of Python's standard library. A tokenizer is learned from it first (a
byte-level BPE of a thousand tokens), then transformers' Trainer trains the paper's hybrid: short convolutions
and ReBased attention in turn. One file in ten is held out, and the model is judged on these, in bits for each
byte of text, beside what the compressor bzip2 needs for the same bytes.
"""

from __future__ import annotations

import argparse
import bz2
import math
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from rebased_cuda import build_info
from rebased_cuda.models import RebasedConfig, RebasedForCausalLM

END = "<|endoftext|>"  # begins every file


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.manual_seed(options.seed)
    files = options.files or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    if len(texts) < 2:
        raise SystemExit("--files: expected at least two, one to train on and one to hold out")
    held_out = texts[::10]
    training = [text for index, text in enumerate(texts) if index % 10]
    tokenizer = learn_tokenizer(training, options.vocabulary)
    rows = windows(tokenizer, training, options.context)
    judged = windows(tokenizer, held_out, options.context)[: options.judged]
    model = RebasedForCausalLM(
        RebasedConfig.of(
            "rebased",
            vocab_size=len(tokenizer),
            hidden_size=options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            intermediate_size=2 * options.width,  # half of what is usual: more steps in the same time
            initializer_range=0.04,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    size = sum(len(text.encode()) for text in training)
    print(
        f"{len(training)} files, {size / 1e6:.1f} MB, {len(rows) * options.context / 1e6:.2f} M tokens to "
        f"train on; {len(held_out)} files held out; {model.num_parameters() / 1e6:.2f} M parameters"
    )

    on_gpu = torch.cuda.is_available() and build_info()["cuda"]
    arguments = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(options.steps // 20, 1),
        weight_decay=0.1,
        adam_beta2=0.98,
        logging_steps=max(options.steps // 10, 1),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        seed=options.seed,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=judged, callbacks=[Progress()])
    trainer.remove_callback(PrinterCallback)  # which prints the numbers as they are
    text = "".join(tokenizer.decode(row["input_ids"]) for row in judged).encode()
    tokens_per_byte = len(judged) * (options.context - 1) / len(text)

    def held_out_bits() -> float:
        return trainer.evaluate()["eval_loss"] / math.log(2) * tokens_per_byte

    before = held_out_bits()
    print(f"before training: {before:.2f} bits a byte of held-out text", flush=True)
    trainer.train()
    compressed = 8 * len(bz2.compress(text)) / len(text)
    print(f"after training:  {held_out_bits():.2f} bits a byte of held-out text (bzip2: {compressed:.2f})")
    trainer.save_model()
    tokenizer.save_pretrained(options.output)
    print(f"saved in {options.output}; next: generate.py --model {options.output}")


def learn_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be written with it, and comes back byte for byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def windows(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], context: int
) -> list[dict[str, Tensor]]:
    """All texts behind one another, cut into rows of `context` tokens, as Trainer takes them."""
    tokens = torch.tensor([token for text in texts for token in tokenizer(END + text)["input_ids"]])
    if len(tokens) < context:
        raise SystemExit(f"--context: expected at most {len(tokens)}, the tokens of the text, got {context}")
    rows = tokens[: len(tokens) // context * context].view(-1, context)
    return [{"input_ids": row, "labels": row} for row in rows]


class Progress(TrainerCallback):
    """A line for every tenth of the training."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            seconds = time.monotonic() - self.start
            line = f"  step {state.global_step} of {state.max_steps}, {seconds:.0f} s"
            print(f"{line}: training loss {float(logs['loss']):.3f} nats a token", flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def setting(name: str, default: Any, text: str) -> None:
        parser.add_argument(name, type=type(default), default=default, help=f"{text} (default: {default})")

    parser.add_argument(
        "--files",
        nargs="+",
        type=Path,
        help="text files to learn from; every tenth is held out (default: Python's standard library)",
    )
    setting("--output", Path("python-lm"), "folder for the model and its tokenizer")
    setting("--steps", 1200, "training steps")
    setting("--batch", 4, "rows in a step")
    setting("--context", 256, "tokens in a row")
    setting("--vocabulary", 1024, "tokens of the tokenizer, at least 257")
    setting("--width", 128, "hidden size of the model")
    setting("--layers", 4, "layers: a convolution, ReBased attention, a convolution, ...")
    setting("--heads", 4, "heads of the attention layers")
    setting("--learning-rate", 6e-3, "the highest, after warming up")
    setting("--judged", 64, "held-out rows that the model is judged on")
    setting("--seed", 0, "of weights and of the order of rows")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
