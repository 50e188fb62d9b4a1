"""The benchmarks' own arithmetic and honesty: what they would get wrong without anyone noticing."""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EMULATED

from benchmarks.speed import __main__ as command
from benchmarks.speed import decode, harness, peers, questions, report
from benchmarks.speed.ceilings import Ceilings
from benchmarks.speed.harness import DIRECTIONS, OURS, Prepared, Row, Shape, UnavailableError, measure
from rebased_cuda import _baselines, _measure, reference

pytestmark = pytest.mark.skipif(EMULATED, reason="benchmarks time the backends that users have")
CEILINGS = Ceilings(dict.fromkeys(("float32", "float64", "bfloat16", "float16"), 190e9), 36e9)


def sleeper(seconds: float, error: float = 0.0) -> Any:
    return lambda: Prepared(lambda: time.sleep(seconds), lambda: error, 1e-3)


def unavailable() -> Prepared:
    raise UnavailableError("not installed")


def out_of_memory() -> Prepared:
    raise RuntimeError("no memory")


def test_rows_of_all_methods_and_their_ratios() -> None:
    methods = {
        OURS: sleeper(0.002),
        "slow": sleeper(0.05),
        "absent": unavailable,
        "broken": out_of_memory,
        "wrong": sleeper(0.001, error=0.5),
        "nan": sleeper(0.001, error=math.nan),
    }
    rows = {row.method: row for row in measure("q", Shape(1, 1, 8), "forward", methods, "cpu", 0.2, 1e-3)}
    assert list(rows) == list(methods)
    assert rows["slow"].ratio is not None
    assert rows["slow"].ratio > 2
    assert rows[OURS].ratio == 1
    assert rows[OURS].over_floor is not None
    assert rows[OURS].over_floor >= 2
    assert len(rows[OURS].seconds) >= harness.ROUNDS[0]
    assert rows["absent"].status == "not installed"
    assert "no memory" in rows["broken"].status
    for name in ("wrong", "nan"):  # checked before it is timed, and then not timed
        assert rows[name].status.startswith("wrong")
        assert rows[name].seconds == ()


def test_methods_take_turns() -> None:
    order: list[str] = []
    _measure.interleave({name: lambda name=name: order.append(name) for name in "abc"}, 3)
    assert "".join(order) == "abcabcabc"


def test_ratios_are_taken_within_a_round() -> None:
    # a machine twice as slow in the second round, three times in the third
    assert _measure.ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == 2.0


def test_peak_memory_sees_what_is_freed_again() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux only")
    with harness.PeakMemory("cpu") as peak:
        torch.ones(64 << 18).sum()  # 64 MiB
    assert peak.bytes is not None
    assert 60 << 20 < peak.bytes < 100 << 20


@pytest.mark.parametrize(
    ("shape", "direction", "milliseconds"),
    [
        (Shape(1, 12, 4096, "outer"), DIRECTIONS[0], 9.3),
        (Shape(1, 12, 4096, "outer"), DIRECTIONS[1], 32.6),
        (Shape(1, 12, 4096, "square"), DIRECTIONS[0], 1.4),
        (Shape(1, 12, 4096, "square"), DIRECTIONS[1], 4.8),
    ],
)
def test_floor(shape: Shape, direction: str, milliseconds: float) -> None:
    assert harness.floor_seconds(shape, direction, CEILINGS) * 1e3 == pytest.approx(milliseconds, rel=0.02)


def test_floor_of_a_slow_memory_is_the_copy() -> None:
    shape = Shape(1, 12, 4096, "square")
    slow = Ceilings(CEILINGS.flops, 1e9)
    assert harness.floor_seconds(shape, DIRECTIONS[0], slow) == pytest.approx(12 * 4096 * 644 / 1e9)


@pytest.mark.parametrize("feature_map", ["outer", "square"])
@pytest.mark.parametrize("feature_dim", [1, 2, 5, 16])
@pytest.mark.parametrize("seqlen", [1, 64, 131])
def test_baselines_equal_the_reference(feature_map: str, feature_dim: int, seqlen: int) -> None:
    shape = Shape(2, 3, seqlen, feature_map, "float64", feature_dim, head_dim=7)
    tensors = [x.detach() for x in peers.projections(shape, "cpu")]
    q, k, v = (peers.split_heads(x, 3) for x in tensors[:3])
    expected = reference.quadratic(q, k, v, *tensors[3:], feature_map=feature_map, layer_norm="token")
    assert isinstance(expected, torch.Tensor)
    forms = {
        "quadratic": _baselines.quadratic,
        "loop": lambda *x, **o: _baselines.chunked_loop(*x, **o, chunk=32),
        "cumsum": lambda *x, **o: _baselines.chunked_cumsum(*x, **o, chunk=32),
    }
    for name, form in forms.items():
        y = form(*tensors, feature_map=feature_map)
        assert _measure.relative_error(y, expected) < 1e-11, name


@pytest.mark.parametrize("feature_map", ["outer", "square"])
@pytest.mark.parametrize("name", peers.EAGER)
def test_peers_run_and_pass_their_check(name: str, feature_map: str) -> None:
    shape = Shape(2, 2, 200, feature_map)
    for direction in DIRECTIONS:
        prepared = peers.prepare(name, shape, direction, "cpu")
        assert prepared.error() <= prepared.bound
        prepared.run()


def test_a_peer_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = _baselines.quadratic
    monkeypatch.setattr(_baselines, "quadratic", lambda *x, **options: honest(*x, **options) * 1.01)
    prepared = peers.prepare(peers.QUADRATIC, Shape(1, 2, 100), "forward", "cpu")
    assert not prepared.error() <= prepared.bound


def test_the_check_reads_some_heads_of_a_large_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "CHECKED", 200)
    peers._checked.cache_clear()
    peers.expected.cache_clear()
    shape = Shape(3, 2, 70)
    prepared = peers.prepare(OURS, shape, "forward", "cpu")
    assert prepared.error() <= prepared.bound
    assert peers.expected(shape, "cpu").shape == (2, 1, 70, 64)
    peers._checked.cache_clear()
    peers.expected.cache_clear()


def test_fla_says_that_it_wants_a_gpu() -> None:
    with pytest.raises(UnavailableError, match="GPU"):
        peers.prepare(peers.FLA, Shape(1, 1, 64), "forward", "cpu")


def test_decoding_rows() -> None:
    rows = {row.method: row for row in decode.rows("cpu", 2, "square", 0.01, lambda text: None)}
    assert all(row.status == "ok" for row in rows.values())
    assert rows[OURS].over_floor is not None
    assert rows[decode.COPY].over_floor is None


def a_row(median: float, spread: float, method: str = OURS) -> dict[str, Any]:
    shape = asdict(Shape(1, 12, 4096, threads=2))
    return Row("q", shape, "forward", method, seconds=(median,), median=median, spread=spread).to_json()


def test_compare_tells_what_moved_beyond_the_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = {
        "when": "now",
        "commit": "",
        "device": "cpu",
        "machine": _measure.machine(),
        "ceilings": CEILINGS.to_json(),
    }
    before = head | {"rows": [a_row(1.0, 0.05), a_row(1.0, 0.05, "peer"), a_row(1.0, 0.01, "gone")]}
    after = head | {"rows": [a_row(1.5, 0.05), a_row(1.08, 0.05, "peer")]}
    changes = {change["row"]["method"]: change["moved"] for change in report.moved(before, after)}
    assert changes == {OURS: True, "peer": False}
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, contents in zip(paths, (before, after), strict=True):
        report.save(path, contents)
    assert command.main(["compare", *map(str, paths)]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 times moved" in printed
    assert "slower" in printed


def test_the_command_leaves_a_table_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tiny(run: questions.Run) -> Any:
        yield from questions._ask(run, "length", [Shape(1, 2, 128), Shape(1, 2, 256)], (*run.few, peers.FLA))

    monkeypatch.setitem(questions.QUESTIONS, "length", tiny)
    monkeypatch.setattr("benchmarks.speed.ceilings.measure", lambda device: CEILINGS)
    path = tmp_path / "speed.json"
    assert command.main(["--quick", "--only", "length", "--output", str(path)]) == 0
    contents = json.loads(path.read_text())
    assert len(contents["rows"]) == 2 * 2 * 5
    assert {"commit", "machine", "ceilings", "version", "when"} <= set(contents)
    printed = capsys.readouterr().out
    assert "outer (1, 2, 256)" in printed
    assert f"{peers.FLA}: runs on a GPU only" in printed
    pytest.importorskip("matplotlib")
    assert command.main(["plot", str(path)]) == 0
    assert all(Path(line).stat().st_size > 1000 for line in capsys.readouterr().out.split())
