"""What every training run here shares: seeds, the device, checkpoints and result lines that survive a kill.

A run may be killed at any moment. A checkpoint is therefore written beside its place and renamed onto it, so
that a reader finds the old one or the new one whole. A result is one line of JSON: a line that was cut short
is left out by `read_json_lines`, and the next one starts on a line of its own. Several processes may work
through one list of runs: `claim` gives each run to one of them, until it is done or dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
import torch


def setting(default: Any, explanation: str) -> Any:
    """A dataclass' field that a command has an option for, with what `--help` says of it."""
    return field(default=default, metadata={"help": explanation})


def limit_threads(threads: int | None, processes: int) -> None:
    """Sets torch's threads: as many as given, else as OMP_NUM_THREADS says, else the process' share of cores.

    Raises:
        ValueError: fewer than one thread.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    if threads is None and "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(threads or max(available_cores() // processes, 1))


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(name: str | None = None) -> torch.device:
    """The device of that name, or a GPU where torch sees one and this build has kernels for it."""
    import rebased_cuda

    if name is None:
        name = "cuda" if rebased_cuda.build_info()["cuda"] and torch.cuda.is_available() else "cpu"
    return torch.device(name)


def seed_everything(seed: int) -> None:
    """The generators of Python, NumPy and torch, for what a model's initialisation draws."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def save_checkpoint(path: Path, contents: Mapping[str, Any]) -> None:
    """Tensors, numbers and strings in dicts and lists -> `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(dict(contents), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """What `save_checkpoint` wrote there; None where there is nothing."""
    if not path.exists():
        return None
    contents: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return contents


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line and waits until it is on disk; safe with several writers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, allow_nan=False)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0, os.SEEK_END)
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a writer was killed within its line
                line = "\n" + line
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of `append_json_line`; none where there is no file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # cut short by a kill: its run is done again
            records.append(json.loads(line))
    return records


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether `path` is this process's now: False while another one has it. Its death sets it free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
