"""A folder of text or code as two streams of tokens, one to train on and one held out.

Which files are held out depends on their relative paths alone, so it stays the same when files are added. The
tokenizer is a byte-level BPE learned on the training files. Tokenizer and tokens are cached in a folder named
after what they were made of, so that a changed file or vocabulary never meets an old cache.

Such a folder of tokens is also what `tokenize` writes, from a folder of text or a dataset of Hugging Face,
and what `--tokens` reads, whoever has made it:

    training.bin, held_out.bin   the tokens one after the other, little-endian without a sign, two bytes each
                                 for a vocabulary of at most 65,536, else four
    tokens.json                  {"vocabulary": V, "training_bytes": T, "held_out_bytes": H}, written last;
                                 the bytes are those of the text, and only shown
    tokenizer.json               by the library `tokenizers`; only `generate` wants it

The files are mapped into memory, so that a run reads what it trains on and no more.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END = "<|endoftext|>"  # between two files
HELD_OUT = 10  # one file in so many
STREAMS = ("training", "held_out")
MARK = "tokens.json"
TOKENIZER_ROWS = 100_000  # of a dataset, that its tokenizer is learned on
BATCH = 1000  # texts that are tokenized at once
LARGEST_FILE = 16 << 20  # bytes; longer ones are rarely text that a person wrote
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "__pycache__", "node_modules"}
)


@dataclass(frozen=True)
class Text:
    """Token streams (tokens,), unsigned and mapped from files, and their tokenizer where there is one."""

    training: Tensor
    held_out: Tensor
    tokenizer: Tokenizer | None
    vocabulary: int
    training_bytes: int
    held_out_bytes: int


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


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
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
    files = read_folder(folder)
    training, held_out = split(files)
    digest = hashlib.sha256(repr((vocabulary, HELD_OUT, END)).encode())
    for path, text in files:
        digest.update(repr((path, len(text))).encode() + text.encode())
    place = cache / f"tokens-{digest.hexdigest()[:16]}"
    if not (place / MARK).exists():
        _tokenize(training, held_out, vocabulary, place)
    return open_tokens(place)


def tokenize(folder: Path, vocabulary: int, place: Path) -> Text:
    """Reads, splits and tokenizes a folder of text into a folder of tokens, whatever was there before.

    Raises:
        ValueError: as `load`.
    """
    _tokenize(*split(read_folder(folder)), vocabulary, place)
    return open_tokens(place)


@dataclass(frozen=True)
class Rows:
    """A dataset's texts, one to a row: about one row in HELD_OUT, by a hash of its number, or the others."""

    dataset: Iterable[Mapping[str, Any]]
    column: str
    held_out: bool

    def __iter__(self) -> Iterator[str]:
        for number, row in enumerate(self.dataset):
            if self.column not in row:
                raise ValueError(f"column: expected one of {', '.join(row)}, got {self.column!r}")
            if _is_held_out(str(number)) == self.held_out:
                yield row[self.column]


def load_dataset(name: str, split_name: str) -> Iterable[Mapping[str, Any]]:
    """Rows of a dataset of Hugging Face: of a folder that `save_to_disk` wrote, or of a name on their hub.

    Raises:
        ImportError: the library `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("--dataset: datasets is not installed: pip install datasets") from error
    if not Path(name).is_dir():
        return datasets.load_dataset(name, split=split_name)
    found = datasets.load_from_disk(name)
    return found[split_name] if isinstance(found, datasets.DatasetDict) else found


def tokenize_dataset(dataset: Iterable[Mapping[str, Any]], column: str, vocabulary: int, place: Path) -> Text:
    """Tokenizes a dataset row by row into a folder of tokens; no more of it than BATCH rows is in memory.

    Args:
        dataset: read three times: once for the tokenizer, TOKENIZER_ROWS of it, and once for each stream.
        column: that holds the text.

    Raises:
        ValueError: there is no such column, or as `load`.
    """
    training, held_out = (Rows(dataset, column, flag) for flag in (False, True))
    _tokenize(training, held_out, vocabulary, place)
    return open_tokens(place)


def open_tokens(place: Path) -> Text:
    """A folder of tokens: see the top of this file.

    Raises:
        ValueError: it is none, or its files and its vocabulary don't go together.
    """
    if not (place / MARK).exists():
        raise ValueError(f"tokens: expected a folder with {MARK}, training.bin and held_out.bin, got {place}")
    facts = json.loads((place / MARK).read_text())
    dtype = _dtype(facts["vocabulary"])
    streams = []
    for name in STREAMS:
        path = place / f"{name}.bin"
        if path.stat().st_size % dtype.itemsize or not path.stat().st_size:
            raise ValueError(f"tokens: expected {dtype.itemsize} bytes a token in {path}")
        # copy on write, which torch wants of memory that it may write to; nothing here does
        streams.append(torch.from_numpy(np.memmap(path, dtype, "c")))
    path = place / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path)) if path.exists() else None
    return Text(*streams, tokenizer, facts["vocabulary"], facts["training_bytes"], facts["held_out_bytes"])


def _dtype(vocabulary: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


def _tokenize(training: Iterable[str], held_out: Iterable[str], vocabulary: int, place: Path) -> None:
    if vocabulary < 257:
        raise ValueError(f"vocabulary: expected at least 257 (every byte and {END}), got {vocabulary}")
    learned_on = training if isinstance(training, list) else islice(training, TOKENIZER_ROWS)
    tokenizer = train_tokenizer(learned_on, vocabulary)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(
            f"vocabulary: expected at most {tokenizer.get_vocab_size()}, all that this text has pairs for, "
            f"got {vocabulary}"
        )
    place.mkdir(parents=True, exist_ok=True)
    # tokens.json last: it stands for all, and several processes may be here at once
    with _whole(place / "tokenizer.json") as path:
        tokenizer.save(str(path))
    facts = {"vocabulary": vocabulary}
    for name, texts in zip(STREAMS, (training, held_out), strict=True):
        with _whole(place / f"{name}.bin") as path:
            facts[f"{name}_bytes"] = _write_stream(tokenizer, texts, _dtype(vocabulary), path)
            if not facts[f"{name}_bytes"]:
                raise ValueError(f"{name}: expected text, got none: more rows or files are needed")
    with _whole(place / MARK) as path:
        path.write_text(json.dumps(facts) + "\n")


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


def _write_stream(tokenizer: Tokenizer, texts: Iterable[str], dtype: np.dtype[Any], path: Path) -> int:
    """Writes the texts' tokens, each text with END behind it, and returns the texts' bytes."""
    end, size, remaining = tokenizer.token_to_id(END), 0, iter(texts)
    with path.open("wb") as file:
        while some := list(islice(remaining, BATCH)):
            for encoding in tokenizer.encode_batch_fast(some):
                np.array([*encoding.ids, end], dtype).tofile(file)
            size += sum(len(text.encode()) for text in some)
    return size


def batch(stream: Tensor, step: int, seed: int, rows: int, context: int) -> Tensor:
    """The rows (rows, context + 1) of a training step: windows of the stream at random places.

    They depend on seed and step alone, so a resumed run and any number of processes read the same.
    """
    _check_length(stream, context)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - context, (rows, 1), generator=generator)
    return stream[starts + torch.arange(context + 1)].long()


def windows(stream: Tensor, context: int, count: int) -> Tensor:
    """At most `count` windows (count, context + 1), evenly over the stream, no target in two of them."""
    _check_length(stream, context)
    available = (len(stream) - 1) // context
    count = min(count, available)
    starts = torch.linspace(0, available - 1, count).long().unsqueeze(1) * context
    return stream[starts + torch.arange(context + 1)].long()


def _check_length(stream: Tensor, context: int) -> None:
    if len(stream) <= context:
        raise ValueError(
            f"text: expected more than {context} tokens, the context's length, got {len(stream)}"
        )
