"""README and the pages of docs/: their code runs as it stands, and their figures are those of the results.

The Python blocks of a page run one after the other, as a reader would type them, and say by `assert` what
they show. A block behind a marker with a file's name is that file, which a console block of the page runs.
"""

import json
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
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
PYTHON = r"```python\n(.*?)```"
MARKED = rf"<!-- (\w+\.py) -->\n{PYTHON}"

pytestmark = pytest.mark.skipif(EMULATED, reason="sequences of thousands of tokens take long on the emulator")


def _files(page: str) -> dict[str, str]:
    return dict(re.findall(MARKED, page, re.DOTALL))


def _examples(page: str) -> list[str]:
    files = _files(page).values()
    return [code for code in re.findall(PYTHON, page, re.DOTALL) if code not in files]


def _commands(page: str) -> list[str]:
    """Those that run a file of the page."""
    lines = "".join(re.findall(r"```console\n(.*?)```", page, re.DOTALL)).splitlines()
    return [line for line in lines if {*shlex.split(line)} & {*_files(page)}]


def _run(code: str, name: str, names: dict | None = None) -> dict:
    names = {} if names is None else names
    exec(compile(code, f"<code of {name}>", "exec"), names)
    return names


def test_the_op_runs():
    names = _run(_examples(README)[0], "README.md")
    assert names["y"].shape == (2, 12, 4096, 64)
    assert names["q"].grad is not None
    assert names["y_next"].shape == (2, 12, 64)


def test_the_layer_runs():
    names = _run(_examples(README)[1], "README.md")
    assert names["state"].kv.shape == (2, 12, 136, 64)
    assert names["y"].shape == (2, 1, 768)
    assert names["pool"].kv[[7, 3]].any(-1).any(-1).all()


def test_the_model_runs():
    pytest.importorskip("transformers", minversion="5.24")
    names = _run(_examples(README)[2], "README.md")
    assert names["said"].shape == (2, 96)
    assert all(x.grad is not None for x in names["model"].parameters())


def test_every_example_of_readme_is_run_by_a_test():
    assert len(_examples(README)) == 3
    assert not _files(README)


@pytest.mark.parametrize("name", [name for name in PAGES if name != "README.md" and _examples(PAGES[name])])
def test_the_code_of_a_page_runs(name):
    pytest.importorskip("transformers", minversion="5.24")
    names: dict = {}
    for code in _examples(PAGES[name]):
        _run(code, name, names)


def test_no_code_escapes():
    """Code is in blocks that the tests here find: not indented, and of a language that is known."""
    for name, page in PAGES.items():
        for indent, language in re.findall(r"^( *)```(\S+)", page, re.MULTILINE):
            assert not indent, f"{name}: an indented block"
            assert language in ("python", "sh", "console", "text"), f"{name}: {language}"


FILES = [(name, line) for name, page in PAGES.items() for line in _commands(page)]


@pytest.mark.parametrize(("name", "command"), FILES, ids=[command for _, command in FILES])
def test_the_processes_run(name, command, tmp_path):
    for file, code in _files(PAGES[name]).items():
        (tmp_path / file).write_text(code)
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


def test_every_file_of_a_page_is_run():
    for name, page in PAGES.items():
        run = {word for line in _commands(page) for word in shlex.split(line)}
        assert {*_files(page)} <= run, name


def test_there_are_exactly_two_commands():
    assert README.count("```sh") == 2


def test_readme_is_short():
    assert README.count("\n") <= 150
    assert len(README.split()) <= 900


def test_links_lead_somewhere():
    for name, page in PAGES.items():
        folder = (ROOT / name).parent
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page):
            assert (folder / target).exists(), f"{name}: {target}"


def test_the_picture_shows_the_results():
    picture = pytest.importorskip("benchmarks.speed.picture")
    assert picture.drawn() == json.loads(json.dumps(picture.panels())), (
        "run python -m benchmarks.speed.picture"
    )


def test_the_caption_names_the_commits():
    picture = pytest.importorskip("benchmarks.speed.picture")
    commits = [json.loads(path.read_text())["commit"][:7] for path in (picture.CPU, picture.GPU)]
    commits += re.findall(r"commit (\w{7})\.", picture.GPU_CHECKS.read_text())[:1]
    assert len({*commits}) == 3
    for name in ("README.md", "docs/performance.md"):
        caption = PAGES[name].partition("pictures/speed.svg)")[2].partition("\n#")[0]
        assert [commit for commit in commits if commit not in caption] == [], name


def test_a_picture_of_other_results_is_told_apart(tmp_path, monkeypatch):
    picture = pytest.importorskip("benchmarks.speed.picture")
    results = json.loads(picture.CPU.read_text())
    for row in results["rows"]:
        if row["median"]:
            row["median"] *= 2
    monkeypatch.setattr(picture, "CPU", tmp_path / "speed.json")
    picture.CPU.write_text(json.dumps(results))
    assert picture.drawn() != json.loads(json.dumps(picture.panels()))
    assert picture.drawn(picture.draw(tmp_path / "speed.svg")) == json.loads(json.dumps(picture.panels()))


def test_the_tables_show_the_results():
    page = pytest.importorskip("benchmarks.speed.page")
    text = PAGES["docs/performance.md"]
    assert [name for _, name, _ in page.BLOCK.findall(text)] == [*page.TABLES]
    assert page.fill(text) == text, "run python -m benchmarks.speed.page"
    emptied = page.BLOCK.sub(r"\1\3", text)
    assert emptied != text
    assert page.fill(emptied) == text
