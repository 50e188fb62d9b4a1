"""A folder of text or code as two streams of tokens, one to train on and one held out.

Which files are held out depends on their relative paths alone, so it stays the same when files are added. The
tokenizer is a byte-level BPE learned on the training files. Tokenizer and tokens are cached in a folder named
after what they were made of, so that a changed file or vocabulary never meets an old cache.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END = "<|endoftext|>"  # between two files
HELD_OUT = 10  # one file in so many
LARGEST_FILE = 16 << 20  # bytes; longer ones are rarely text that a person wrote
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "__pycache__", "node_modules"}
)


@dataclass(frozen=True)
class Text:
    """Token streams (tokens,) int64 and the tokenizer that they come from."""

    training: Tensor
    held_out: Tensor
    tokenizer: Tokenizer
    training_bytes: int
    held_out_bytes: int

    @property
    def vocabulary(self) -> int:
        return int(self.tokenizer.get_vocab_size())


def default_folder() -> Path:
    """The Python standard library's own sources, which every machine has."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_folder(folder: Path) -> list[tuple[str, str]]:
    """(relative path, text) of every UTF-8 file below the folder, sorted by path.

    Of the standard library only *.py, as the folder also holds what was compiled from it. Hidden files, tests
    and installed packages are left out.

    Raises:
        ValueError: there are fewer than two such files.
    """
    only_python = folder.resolve() == default_folder().resolve()
    found = []
    for path in sorted(folder.rglob("*.py" if only_python else "*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if hidden or SKIPPED_FOLDERS.intersection(parts[:-1]) or not path.is_file():
            continue
        if path.stat().st_size > LARGEST_FILE:
            continue
        data = path.read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        if text and "\0" not in text:
            found.append(("/".join(parts), text))
    if len(found) < 2:
        raise ValueError(
            f"{folder}: expected at least two UTF-8 files, one to train on and one to hold out, "
            f"found {len(found)}"
        )
    return found


def split(files: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Texts (to train on, held out): about one file in HELD_OUT, by a hash of its path; at least one each."""
    ranked = sorted(files, key=lambda file: hashlib.sha256(file[0].encode()).digest())
    few = sum(_is_held_out(path) for path, _ in ranked)
    count = min(max(few, 1), len(ranked) - 1)
    chosen = {path for path, _ in ranked[:count]}
    training = [text for path, text in files if path not in chosen]
    return training, [text for path, text in files if path in chosen]


def _is_held_out(path: str) -> bool:
    return hashlib.sha256(path.encode()).digest()[0] < 256 / HELD_OUT


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
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
    return tokenizer


def load(folder: Path, vocabulary: int, cache: Path) -> Text:
    """Reads, splits and tokenizes a folder, or takes all that from the cache.

    Raises:
        ValueError: too few files, or a vocabulary that the training text cannot fill or that lacks bytes.
    """
    if vocabulary < 257:
        raise ValueError(f"vocabulary: expected at least 257 (every byte and {END}), got {vocabulary}")
    files = read_folder(folder)
    training, held_out = split(files)
    digest = hashlib.sha256(repr((vocabulary, HELD_OUT, END)).encode())
    for path, text in files:
        digest.update(repr((path, len(text))).encode() + text.encode())
    place = cache / f"tokens-{digest.hexdigest()[:16]}"
    if not (place / "tokens.npz").exists():
        _tokenize(training, held_out, vocabulary, place)
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    with np.load(place / "tokens.npz") as tokens:
        streams = [torch.from_numpy(tokens[name].astype(np.int64)) for name in ("training", "held_out")]
    sizes = [sum(len(text.encode()) for text in texts) for texts in (training, held_out)]
    return Text(streams[0], streams[1], tokenizer, sizes[0], sizes[1])


def _tokenize(training: list[str], held_out: list[str], vocabulary: int, place: Path) -> None:
    tokenizer = train_tokenizer(training, vocabulary)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(
            f"vocabulary: expected at most {tokenizer.get_vocab_size()}, all that this text has pairs for, "
            f"got {vocabulary}"
        )
    place.mkdir(parents=True, exist_ok=True)
    # tokens.npz last: it stands for both, and several processes may be here at once
    with _whole(place / "tokenizer.json") as path:
        tokenizer.save(str(path))
    with _whole(place / "tokens.npz") as path, path.open("wb") as file:
        np.savez(file, training=_stream(tokenizer, training), held_out=_stream(tokenizer, held_out))


class _whole:  # noqa: N801 a context manager, used like a function
    """A file that appears under its name complete or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f"{path.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        return self.partial

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.partial.replace(self.path)
        else:
            self.partial.unlink(missing_ok=True)


def _stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    end = tokenizer.token_to_id(END)

    def tokens() -> Iterator[int]:
        for encoding in tokenizer.encode_batch_fast(texts):
            yield from encoding.ids
            yield end

    return np.fromiter(tokens(), np.int32)


def batch(stream: Tensor, step: int, seed: int, rows: int, context: int) -> Tensor:
    """The rows (rows, context + 1) of a training step: windows of the stream at random places.

    They depend on seed and step alone, so a resumed run and any number of processes read the same.
    """
    _check_length(stream, context)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - context, (rows, 1), generator=generator)
    return stream[starts + torch.arange(context + 1)]


def windows(stream: Tensor, context: int, count: int) -> Tensor:
    """At most `count` windows (count, context + 1), evenly over the stream, no target in two of them."""
    _check_length(stream, context)
    available = (len(stream) - 1) // context
    count = min(count, available)
    starts = torch.linspace(0, available - 1, count).long().unsqueeze(1) * context
    return stream[starts + torch.arange(context + 1)]


def _check_length(stream: Tensor, context: int) -> None:
    if len(stream) <= context:
        raise ValueError(
            f"text: expected more than {context} tokens, the context's length, got {len(stream)}"
        )
