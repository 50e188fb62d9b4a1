"""The examples at a small size, one after the other as a reader would run them, and that they can fail."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("accelerate")

from tiny_models import VOCABULARY, recomputed, tiny_model

FOLDER = Path(__file__).parents[2] / "examples"
FILES = sorted(FOLDER.glob("*.py"))
SMALL = {"width": 48, "layers": 2, "heads": 2, "context": 64, "vocabulary": 300, "judged": 8, "steps": 40}
pytestmark = [
    pytest.mark.skipif(not FILES, reason="needs the source folder"),
    pytest.mark.usefixtures("one_thread"),
]


def load(name: str) -> ModuleType:
    """The example, imported by its path."""
    specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where dataclasses look
    specification.loader.exec_module(module)
    return module


def run_by_path(folder: Path, *command: str) -> str:
    """What the command prints, run from another folder than the sources'."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a model that train_lm.py made, and what it printed: 40 steps of few bytes."""
    folder = tmp_path_factory.mktemp("examples")
    names = ["ast", "argparse", "inspect", "pathlib", "random", "textwrap"]
    files = [str(Path(ast.__file__).with_name(f"{name}.py")) for name in names]
    sizes = [f"--{name}={value}" for name, value in SMALL.items()]
    command = [*sizes, "--learning-rate=0.01", "--files", *files]
    printed = run_by_path(folder, str(FOLDER / "train_lm.py"), *command)
    return folder / "python-lm", printed


def test_training_learns(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    before = number(r"before training: ([\d.]+) bits", printed)
    after = number(r"after training: +([\d.]+) bits", printed)
    assert 0 < after < before - 0.8
    assert len(re.findall(r"step \d+ of 40, .*: training loss", printed)) == 10
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}


def test_generating_from_what_was_trained(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    command = ["--model", str(folder), "--prompt", "def main", "--tokens", "40"]
    printed = run_by_path(folder.parent, str(FOLDER / "generate.py"), *command)
    assert "def main" in printed
    text = printed.partition("def main")[2].partition("\n40 tokens in")[0]
    assert len(set(text)) > 8
    assert number(r"from a state of (\d+) kB", printed) > 0


def test_adapters_learn_and_generate(
    trained: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    folder, _ = trained
    weights = (folder / "model.safetensors").read_bytes()
    command = f"--model {folder} --output {tmp_path / 'docs'} --steps 25 --context 64 --learning-rate 0.02"
    load("finetune_lora").main(command.split())
    printed = capsys.readouterr().out
    before = number(r"before: ([\d.]+) bits", printed)
    assert number(r"after: +([\d.]+) bits", printed) < before - 0.05
    assert number(r"without the adapters again: ([\d.]+)", printed) == before
    assert (folder / "model.safetensors").read_bytes() == weights
    generate = load("generate")
    said = []
    for model in (folder, tmp_path / "docs"):
        generate.main(f"--model {model} --tokens 30 --temperature 1".split())
        said.append(capsys.readouterr().out.partition("\n30 tokens in")[0])
    assert said[0] != said[1]  # so that the adapters were loaded


def test_the_picture_of_attention(
    trained: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    plot = load("plot_attention")
    plot.main(["--model", str(trained[0]), "--text", "return 1\\n", "--output", str(tmp_path / "a.png")])
    printed = capsys.readouterr().out
    assert len(re.findall(r"layer 1, head \d: the last token, .* attends most to", printed)) == 2
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_requests_come_and_go(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    load("serve").main(f"--model {trained[0]} --requests 7 --slots 3 --tokens 12".split())
    printed = capsys.readouterr().out
    assert "7 of 7 texts equal to serving them alone" in printed
    taken = re.findall(r"request (\d) takes slot (\d)", printed)
    assert [request for request, _ in taken] == list("0123456")
    assert {slot for _, slot in taken} == set("012")
    assert printed.index("leaves slot") < printed.index("request 6 takes")


def served(serve: ModuleType, model: Any, slots: int, temperature: float) -> list[Any]:
    random = torch.Generator().manual_seed(3)
    requests = []
    for index in range(8):
        prompt = torch.randint(VOCABULARY, (3 + index % 4,), generator=random).tolist()
        requests.append(serve.Request(index, prompt, 6 + 5 * index % 7))
    serve.serve(model, requests, slots, temperature)
    return requests


@pytest.mark.parametrize("name", ["rebased", "positions", "based", "grouped"])
def test_served_texts_are_recomputed_ones(name: str) -> None:
    serve, model = load("serve"), tiny_model(name)
    for request in served(serve, model, 3, 0.0):
        whole = recomputed(model, torch.tensor([request.prompt]), request.wanted)
        assert request.tokens == whole[0, len(request.prompt) :].tolist()
    together, alone = (served(serve, model, slots, 3.0) for slots in (3, 1))
    assert all(map(serve.same, together, alone))
    assert [request.tokens for request in together] != [x.tokens for x in served(serve, model, 3, 0.0)]


def test_a_slot_that_is_not_emptied_is_found(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve, model = load("serve"), tiny_model()
    expected = served(serve, model, 3, 1.0)
    monkeypatch.setattr(serve.Pool, "empty", lambda self, slot: None)
    equal = list(map(serve.same, served(serve, model, 3, 1.0), expected))
    assert all(equal[:3])  # which had empty slots, as nobody came before
    assert sum(equal[3:]) < 3  # of five; a short text may be the same by chance
    monkeypatch.setattr(serve, "same", lambda one, other: one.number != 2)
    with pytest.raises(SystemExit, match="FAILED: a text depends on what else was served"):
        serve.main(f"--model {trained[0]} --requests 3 --tokens 2".split())


@pytest.mark.slow
def test_serving_the_papers_model(capsys: pytest.CaptureFixture[str]) -> None:
    load("serve").main(["--requests", "5", "--slots", "4", "--tokens", "8"])
    printed = capsys.readouterr().out
    assert "rebased-157m: 157.0 M parameters" in printed
    assert "5 of 5 texts equal to serving them alone" in printed


def test_a_sequence_over_two_processes(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(FOLDER / "long_context.py")]
    printed = run_by_path(tmp_path, *command, "--length", "1024", "--width", "32", "--layers", "2")
    steps = re.findall(r"step \d: loss ([\d.]+), of one process ([\d.]+)", printed)
    assert len(steps) == 3
    assert float(steps[2][0]) < float(steps[0][0])
    assert number(r"largest relative difference ([\d.e+-]+)", printed) < 1e-4
    assert "2 processes: " in printed


def test_different_losses_and_gradients_are_faults() -> None:
    long_context = load("long_context")
    gradients = [torch.ones(3), torch.tensor([1.0, 2.0])]
    wrong = [torch.ones(3), torch.tensor([1.0, 2.001])]
    assert long_context.report(torch.tensor([2.0, 1.0]), [2.0, 1.0], gradients, gradients) == 0
    assert long_context.report(torch.tensor([2.0, 1.001]), [2.0, 1.0], wrong, gradients) == 2
    assert long_context.report(torch.tensor([2.0, float("nan")]), [2.0, 1.0], gradients, gradients) == 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_example_explains_itself(file: Path) -> None:
    """A docstring with a command, and a help text for each setting."""
    tree = ast.parse(file.read_text())
    assert f"examples/{file.name}" in (ast.get_docstring(tree) or "")
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
    ]
    assert calls
    for call in calls:
        assert any(keyword.arg == "help" for keyword in call.keywords), ast.unparse(call)
    assert f"`{file.name}`" in (FOLDER / "README.md").read_text()
