"""Processes of one gloo group on this machine, kept alive from test to test.

`run(function, *arguments)` calls function(*arguments) on every rank at once and returns the ranks' results.
Any failure on any rank fails the test, and the processes are started afresh for the next one.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 60  # seconds


def _serve(connection: Connection, rank: int, ranks: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=PATIENCE / 2),
    )
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            break
        try:
            torch.manual_seed(0)
            connection.send((True, function(*arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Processes:
    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._running: list[tuple[Any, Connection]] = []
        self._folder: Any = None

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not self._running:
            self._start()
        for _, connection in self._running:
            connection.send((function, arguments))
        results, errors = [], []
        for rank, (process, connection) in enumerate(self._running):
            if errors and not connection.poll(1):  # it waits for one that has failed
                continue
            if not connection.poll(PATIENCE):
                errors.append(f"rank {rank}: no answer in {PATIENCE} s")
                continue
            try:
                fine, result = connection.recv()
            except EOFError:
                process.join()
                fine, result = False, f"ended with exit code {process.exitcode}"
            (results if fine else errors).append(result if fine else f"rank {rank}: {result}")
        if errors:
            self.stop()
            raise AssertionError("\n".join(errors))
        return results

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        rendezvous = str(Path(self._folder.name) / "rendezvous")
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.ranks, rendezvous), daemon=True)
            process.start()
            theirs.close()
            self._running.append((process, ours))

    def stop(self) -> None:
        for _, connection in self._running:
            connection.close()
        for process, _ in self._running:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._running = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
