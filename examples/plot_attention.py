"""Draws where the heads of a trained model attend: a picture for every head of every ReBased layer.

    python examples/plot_attention.py --text "def area(width, height):\\n    return width * height"

Linear attention never makes this matrix of tokens by tokens; `ReBasedAttention.attention_matrix` does, for
looking at. A row is a token that asks, a column one that answers, and the entries of a row add up to one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, and no window
import torch
from matplotlib import pyplot
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import rebased_cuda.models  # noqa: F401 - tells transformers' Auto classes of the models
from rebased_cuda import ReBasedAttention


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokens = tokenizer(options.text.replace("\\n", "\n"), return_tensors="pt").input_ids
    words = [tokenizer.decode(token) for token in tokens[0]]
    matrices = attention(model, tokens)
    if not matrices:
        raise SystemExit("--model: expected one with linear attention")

    labels = [repr(word)[1:-1] for word in words]
    heads = max(len(matrix) for matrix in matrices.values())
    figure, grid = pyplot.subplots(
        len(matrices), heads, figsize=(4 * heads, 4 * len(matrices)), squeeze=False, layout="constrained"
    )
    for row, (index, matrix) in zip(grid, matrices.items(), strict=True):
        for head, (axes, weights) in enumerate(zip(row, matrix, strict=True)):
            axes.imshow(weights.numpy(), vmin=0, vmax=1, cmap="viridis")
            axes.set_title(f"layer {index}, head {head}", fontsize=9)
            axes.set_xticks(range(len(words)), labels, rotation=90, fontsize=5)
            axes.set_yticks(range(len(words)), labels, fontsize=5)
            most = int(weights[-1].argmax())
            print(
                f"layer {index}, head {head}: the last token, {words[-1]!r}, attends most to "
                f"token {most}, {words[most]!r}, by {float(weights[-1, most]):.2f}"
            )
    figure.savefig(options.output, dpi=130)
    print(f"{len(words)} tokens; picture in {options.output}")


@torch.no_grad()
def attention(model: torch.nn.Module, tokens: Tensor) -> dict[int, Tensor]:
    """(heads, N, N) of tokens (1, N), by the index of each layer that has linear attention."""
    found = {}
    hooks = []
    for index, block in enumerate(model.model.layers):
        if isinstance(block.mixer, ReBasedAttention):

            def look(mixer: ReBasedAttention, inputs: tuple[Tensor, ...], index: int = index) -> None:
                found[index] = mixer.attention_matrix(inputs[0])[0]

            hooks.append(block.mixer.register_forward_pre_hook(look))
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


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
        "--text",
        default="def area(width, height):\\n    return width * height",
        help="what to read, \\n for a new line, of up to about 50 tokens (default: a short function)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("attention.png"),
        help="file of the picture: .png, .svg or .pdf (default: attention.png)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
