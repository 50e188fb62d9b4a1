"""Checkpoints and result lines against kills at the worst moment, and runs shared between processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.training import append_json_line, claim, load_checkpoint, read_json_lines, save_checkpoint

REPOSITORY = Path(__file__).parents[2]

WRITER = """
import sys, torch
from pathlib import Path
from benchmarks.training import save_checkpoint
for number in range(10**9):
    save_checkpoint(Path(sys.argv[1]), {"number": number, "x": torch.full((200_000,), float(number))})
"""

HOLDER = """
import sys, time
from pathlib import Path
from benchmarks.training import claim
with claim(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "checkpoint.pt"
    assert load_checkpoint(path) is None
    save_checkpoint(path, {"step": 3, "model": {"weight": torch.arange(4.0)}})
    contents = load_checkpoint(path)
    assert contents is not None
    assert contents["step"] == 3
    assert torch.equal(contents["model"]["weight"], torch.arange(4.0))
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 3})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"step": 4, "bad": (x for x in ())})
    assert load_checkpoint(path) == {"step": 3}
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    for delay in (0.0, 0.013, 0.029):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=REPOSITORY)
        first = path.stat().st_mtime_ns if path.exists() else 0
        while not path.exists() or path.stat().st_mtime_ns == first:
            assert writer.poll() is None
            time.sleep(0.01)
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        contents = load_checkpoint(path)
        assert contents is not None
        assert bool((contents["x"] == contents["number"]).all())


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert read_json_lines(path) == []
    append_json_line(path, {"cell": 1})
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(json.dumps({"cell": 2}).encode()[:6])
    append_json_line(path, {"cell": 3})
    assert read_json_lines(path) == [{"cell": 1}, {"cell": 3}]
    assert path.read_bytes().startswith(whole)
    with pytest.raises(ValueError, match="JSON"):  # NaN is not JSON
        append_json_line(path, {"loss": float("nan")})


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "cell.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    with claim(path) as mine:
        assert not mine
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    with claim(path) as mine:
        assert mine
