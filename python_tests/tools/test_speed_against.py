"""Two versions of the op side by side: when one is called slower, what is refused, and the whole command."""

import json
import random
import re
import shutil
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import EMULATED

import rebased_cuda
from benchmarks.speed import __main__ as command
from benchmarks.speed import against, op, questions, version
from benchmarks.speed.op import STEP, Call, Shape
from benchmarks.speed.questions import Question, Run

pytestmark = pytest.mark.skipif(EMULATED, reason="benchmarks time the backends that users have")
PACKAGE = Path(rebased_cuda.__file__).parent
TINY = [Call(Shape(1, 2, 128, "square"), "forward"), Call(Shape(1, 2, 1), STEP)]


def pairs(factor: float, noise: float, count: int = 40, seed: int = 0) -> list[float]:
    """Ratios of a version that takes `factor` of the other's time, on a machine that others use too."""
    generator = random.Random(seed)

    def seconds() -> float:
        return (1 + noise * generator.random()) * (3 if generator.random() < 0.05 else 1)

    return [factor * seconds() / seconds() for _ in range(count)]


def test_the_interval_is_of_the_order_statistics() -> None:
    for count, first in ((6, 1), (20, 6), (40, 14), (100, 40)):  # the tables of the sign test
        ratios = [float(i) for i in range(1, count + 1)]
        assert against.interval(ratios[::-1]) == (first, count + 1 - first)
    assert against.interval([1.0] * 5) == (0.0, float("inf"))


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    held = [low <= 1 <= high for low, high in (against.interval(pairs(1, 0.2, seed=i)) for i in range(1000))]
    assert 0.94 < sum(held) / 1000 < 0.98


@pytest.mark.parametrize("seed", range(5))
def test_verdicts(seed: int) -> None:
    assert against.verdict(pairs(1.06, 0.02, seed=seed)) == "slower"
    assert against.verdict(pairs(0.9, 0.02, seed=seed)) == "faster"
    assert against.verdict(pairs(1.0, 0.02, seed=seed)) == "not slower"
    assert against.verdict(pairs(1.04, 0.3, seed=seed)) == "unclear"


def test_some_slow_pairs_are_no_slower_version() -> None:
    assert against.verdict([1.0] * 15 + [2.0] * 5) == "not slower"
    assert against.verdict([1.05] * 15 + [0.5] * 5) == "slower"
    assert against.verdict([1.03] * 20) == "not slower"  # the interval must lie above


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_are_those_of_the_questions_and_each_call_is_one(device: str) -> None:
    assert against.NAMES == ["reference", "length", "dtypes", "feature_maps", "decoding", "overhead"]
    rows = against.rows(against.NAMES, Run(device, False, None, print))
    assert len({row.call for row in rows}) == len(rows)
    asked = {str(row.call): row.questions for row in rows}
    dtype = " bfloat16" if device == "cuda" else ""
    assert {"length"} == set(asked[f"elu (1, 1, 262144){dtype}, forward + backward"])
    assert asked["outer (256, 12, 1), step"] == ["decoding"]
    if device == "cpu":
        assert asked["outer (1, 12, 4096), forward"] == ["reference", "dtypes", "feature_maps"]
        assert sum(len(row.questions) for row in rows) == 12 + 12 + 8 + 16 + 16 + 4 + 3


def test_a_process_that_has_answered_sleeps() -> None:
    begin, busy = time.monotonic(), time.process_time()
    version.settle()
    assert time.monotonic() - begin < 0.2
    assert time.process_time() - busy < 0.1


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A second checkout: a copy of this package, and two calls to time."""
    shutil.copytree(PACKAGE, tmp_path / "other" / "rebased_cuda")
    for name in ("overhead", "decoding"):
        calls = TINY if name == "overhead" else TINY[1:]
        question = Question("tiny", (1.0, 1.0), lambda run: iter(()), lambda run, calls=calls: calls)
        monkeypatch.setitem(questions.QUESTIONS, name, question)
    return tmp_path / "other"


def compare(folder: Path, *arguments: str) -> int:
    return command.main(["against", str(folder), "--only", "overhead", *arguments, "--threads", "1"])


def test_the_command_against_a_copy_of_this_version(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "against.json"
    status = compare(other, "decoding", "--pairs", "8", "--output", str(path))
    printed = capsys.readouterr().out
    contents = json.loads(path.read_text())
    slower = sum(row["verdict"] == "slower" for row in contents["rows"])
    assert status == (slower > 0)  # the machine decides that, and 8 pairs say little
    assert re.search(rf"\n2 rows in \d+ s: {slower} slower, \d faster, \d unclear, 0 failed\.\n$", printed)
    assert contents["other"]["folder"] == str(other)
    assert contents["this"]["folder"] == str(PACKAGE.parent)
    assert contents["this"]["build"] == contents["other"]["build"] == rebased_cuda.build_info()
    assert [row["questions"] for row in contents["rows"]] == [["overhead"], ["overhead", "decoding"]]
    assert [Call(Shape(**row["shape"]), row["direction"]) for row in contents["rows"]] == TINY
    for row in contents["rows"]:
        assert len(row["this"]) == len(row["other"]) == len(row["ratios"]) == 8
        assert row["ratios"][0] == row["this"][0] / row["other"][0]
        assert row["calls"] > 1
        assert row["calls"] * min(row["this"]) > against.REPETITION / 8
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1]


def change(folder: Path, lines: str) -> None:
    """Puts lines at the end of a copy's __init__.py."""
    path = folder / "rebased_cuda" / "__init__.py"
    path.write_text(path.read_text() + textwrap.dedent(lines))


def test_a_version_may_be_faster_at_one_row_and_fail_at_another(
    other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(
        other,
        """
        def rebased_attention(q, k, v, *affine, **options):
            return v


        def rebased_attention_step(*arguments, **options):
            raise NotImplementedError("not yet")
        """,
    )
    assert compare(other, "--pairs", "20") == 1
    printed = capsys.readouterr().out
    assert "failed in other: " in printed
    assert printed.endswith("1 slower, 0 faster, 0 unclear, 1 failed.\n")


def test_a_folder_without_a_build_is_refused(other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (other / "rebased_cuda").glob("*.so"):
        path.unlink()
    assert compare(other) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "has no built rebased_cuda: run `python setup.py build_ext --inplace` there" in printed
    assert compare(other / "missing") == 2


def introduce(folder: Path) -> None:
    with against.Version("other", folder, "cpu", 1) as process:
        process.introduce()


def test_a_build_that_does_not_load_is_refused(other: Path) -> None:
    for path in (other / "rebased_cuda").glob("*.so"):
        path.write_bytes(b"not a library")
    with pytest.raises(against.RefusedError, match=f"{other} cannot be timed: failed in other: ImportError"):
        introduce(other)


def test_a_process_that_imports_another_folder_is_refused(other: Path) -> None:
    # without its __init__.py the folder is no package, and Python goes on to the installed one
    (other / "rebased_cuda" / "__init__.py").unlink()
    with pytest.raises(against.RefusedError, match=f"comes from {PACKAGE}, not from {other}"):
        introduce(other)


def test_questions_without_calls_and_too_few_pairs_are_refused(
    other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--only", "threads", "--quick", "against", str(other)]) == 2
    assert "no question of threads has rows of the op alone" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare(other, "--pairs", "5")
    assert "at least 6" in capsys.readouterr().err


def test_what_was_said_before_the_commands_name_holds() -> None:
    arguments = command._arguments(["--only", "dtypes", "--device", "cuda", "against", "x", "--pairs", "30"])
    assert (arguments.device, arguments.only, arguments.pairs) == ("cuda", ["dtypes"], 30)


def test_the_op_is_called_by_its_public_names_alone() -> None:
    # another version's private modules may have other names
    source = Path(op.__file__).read_text() + Path(version.__file__).read_text()
    imports = [line.strip() for line in source.splitlines() if "import" in line and "rebased_cuda" in line]
    public = "from rebased_cuda import RebasedState, rebased_attention, rebased_attention_step"
    assert [line for line in imports if line.startswith(("from", "import"))] == [
        public,
        "import rebased_cuda",
    ]
    assert sys.modules["benchmarks.speed.op"] is op
