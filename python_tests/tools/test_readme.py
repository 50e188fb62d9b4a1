"""README's examples run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EMULATED

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = r"```python\n(.*?)```"
FILES = dict(re.findall(rf"<!-- (\w+\.py) -->\n{PYTHON}", README, re.DOTALL))
EXAMPLES = [code for code in re.findall(PYTHON, README, re.DOTALL) if code not in FILES.values()]
COMMANDS = re.findall(r"```console\n(.*?)```", README, re.DOTALL)

pytestmark = pytest.mark.skipif(EMULATED, reason="sequences of thousands of tokens take long on the emulator")


def _run(code: str) -> dict:
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_ten_lines_run():
    names = _run(EXAMPLES[0])
    assert names["y"].shape == (2, 12, 4096, 64)
    assert names["q"].grad is not None
    assert names["y_next"].shape == (2, 12, 64)


def test_the_layers_go_on():
    names = _run(EXAMPLES[1])
    assert names["state"].kv.shape == (2, 12, 136, 64)
    assert names["y"].shape == (2, 1, 768)
    assert names["pool"].kv[[7, 3]].any(-1).any(-1).all()


def test_the_language_model_runs():
    pytest.importorskip("transformers", minversion="5.24")
    names = _run(EXAMPLES[2])
    assert names["said"].shape == (2, 96)
    assert all(x.grad is not None for x in names["model"].parameters())


def test_the_compatible_calls_run():
    names = _run(EXAMPLES[3])
    assert names["o"].shape == (2, 1024, 12, 64)
    assert names["state"][0].shape == (2, 12, 16, 64)
    assert names["y"].shape == (2, 1024, 768)


def test_every_example_is_run_by_a_test():
    assert len(EXAMPLES) == 4
    assert set(FILES) == {word for command in COMMANDS for word in command.split() if word.endswith(".py")}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.strip())
def test_the_processes_run(command, tmp_path):
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"rank \d of 2: \d+\.\d+", done.stdout)
    assert len(losses) == 2, done.stdout


def test_there_are_exactly_two_commands():
    assert README.count("```sh") == 2
