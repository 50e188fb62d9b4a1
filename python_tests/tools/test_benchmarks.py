"""The benchmarks' own arithmetic and honesty: what they would get wrong without anyone noticing."""

import json
import math
import sys
import time
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EMULATED
from tiny_models import tiny_model

from benchmarks.speed import __main__ as command
from benchmarks.speed import (
    fast_transformers,
    generation,
    harness,
    others,
    peers,
    questions,
    report,
    targets,
    worker,
)
from benchmarks.speed.ceilings import Ceilings
from benchmarks.speed.harness import DIRECTIONS, OURS, Method, Prepared, Row, Shape, UnavailableError, measure
from benchmarks.speed.questions import Question, Run, decoding, nothing_slower
from rebased_cuda import GatedShortConvolution, ReBasedAttention, RebasedState, build_info, reference
from rebased_cuda.demo import baselines, timing

pytestmark = pytest.mark.skipif(EMULATED, reason="benchmarks time the backends that users have")
SMALL = Shape(1, 1, 8)
CEILINGS = Ceilings(dict.fromkeys(("float32", "float64", "bfloat16", "float16"), 190e9), 36e9)


def sleeper(seconds: float, error: float = 0.0) -> Any:
    return lambda: Prepared(lambda: time.sleep(seconds), lambda: error, 1e-3)


def methods_of(prepare: dict[str, Any], shape: Shape = SMALL) -> list[Method]:
    return [Method(name, shape, function) for name, function in prepare.items()]


def a_run(quick: bool = True) -> Run:
    return Run("cpu", quick, CEILINGS, lambda text: None)


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
    measured = measure("q", "forward", methods_of(methods), "cpu", 0.2, CEILINGS)
    rows = {row.method: row for row in measured}
    assert list(rows) == list(methods)
    assert rows["slow"].ratio is not None
    assert rows["slow"].ratio > 2
    assert rows[OURS].ratio == 1
    floor = harness.floor_seconds(SMALL, "forward", CEILINGS)
    assert rows[OURS].median is not None
    assert rows[OURS].over_floor == pytest.approx(rows[OURS].median / floor)
    assert rows["slow"].over_floor is None
    assert len(rows[OURS].seconds) >= harness.ROUNDS[0]
    assert rows["absent"].status == "not installed"
    assert "no memory" in rows["broken"].status
    for name in ("wrong", "nan"):  # checked before it is timed, and then not timed
        assert rows[name].status.startswith("wrong")
        assert rows[name].seconds == ()


def misused() -> Prepared:
    raise TypeError("unexpected keyword")


def test_a_peer_may_fail_in_any_way_and_the_op_may_not() -> None:
    rows = measure("q", "forward", methods_of({OURS: sleeper(0.001), "peer": misused}), "cpu", 0.01)
    assert [row.status for row in rows] == ["ok", "failed: unexpected keyword"]
    with pytest.raises(TypeError):
        measure("q", "forward", methods_of({OURS: misused}), "cpu", 0.01)


def test_slow_methods_sit_out_the_later_rounds_and_the_first_one_none() -> None:
    schedule = harness._rounds({"base": 0.5, "slow": 2.0, "quick": 1e-3}, 3.0, "base")
    assert schedule == [(3, ["base", "slow", "quick"]), (15, ["base", "quick"])]


def test_first_rounds_of_short_runs_do_not_count() -> None:
    calls = iter([0.01] + [0.25] * harness.UNCOUNTED)  # the warm-up, then rounds that find no pages
    method = Method(OURS, SMALL, lambda: Prepared(lambda: time.sleep(next(calls, 0.01)), lambda: 0.0, 1.0))
    (row,) = measure("q", "forward", [method], "cpu", 0.01)
    assert next(calls, None) is None
    assert max(row.seconds) < 0.25


def test_threads_are_set_for_each_method_and_put_back() -> None:
    seen: dict[str, set[int]] = {"one": set(), "all": set()}

    def noting(name: str) -> Any:
        return lambda: Prepared(lambda: seen[name].add(torch.get_num_threads()), lambda: 0.0, 0.0)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        methods = [
            Method("all", Shape(1, 1, 8), noting("all")),
            Method("one", Shape(1, 1, 8, threads=1), noting("one")),
        ]
        rows = measure("q", "forward", methods, "cpu", 0.01)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {"one": {1}, "all": {2}}
    assert [row.shape["threads"] for row in rows] == [2, 1]


def test_methods_take_turns() -> None:
    order: list[str] = []
    timing.interleave({name: lambda name=name: order.append(name) for name in "abc"}, 3)
    assert "".join(order) == "abcabcabc"


def test_ratios_are_taken_within_a_round() -> None:
    # a machine twice as slow in the second round, three times in the third
    assert timing.ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == 2.0


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


def test_floor_of_a_short_sequence_is_without_a_state() -> None:
    short = harness.floor_seconds(Shape(1, 12, 128), DIRECTIONS[0], CEILINGS)
    assert short == pytest.approx(12 * 128 * 128 * (16 + 64) / 190e9)
    both = harness.floor_seconds(Shape(1, 12, 128), DIRECTIONS[1], CEILINGS)
    assert both == pytest.approx(12 * 128 * 128 * (16 + 64 + 3 * 16 + 2 * 64) / 190e9)


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
        "quadratic": baselines.quadratic,
        "loop": lambda *x, **o: baselines.chunked_loop(*x, **o, chunk=32),
        "cumsum": lambda *x, **o: baselines.chunked_cumsum(*x, **o, chunk=32),
    }
    for name, form in forms.items():
        y = form(*tensors, feature_map=feature_map)
        assert timing.relative_error(y, expected) < 1e-11, name


@pytest.mark.parametrize("feature_map", ["outer", "square"])
@pytest.mark.parametrize("name", peers.EAGER)
def test_peers_run_and_pass_their_check(name: str, feature_map: str) -> None:
    shape = Shape(2, 2, 200, feature_map)
    for direction in DIRECTIONS:
        prepared = peers.prepare(name, shape, direction, "cpu")
        assert prepared.error() <= prepared.bound
        prepared.run()


def test_a_peer_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = baselines.quadratic
    monkeypatch.setattr(baselines, "quadratic", lambda *x, **options: honest(*x, **options) * 1.01)
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


@pytest.mark.parametrize(("device", "is_late"), [("cpu", True), ("cuda", False)])
def test_compiling_on_a_gpu_is_not_the_questions_time(
    device: str, is_late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def slow(*_: Any) -> list[Row]:
        now[0] += 100.0
        return []

    monkeypatch.setattr(questions.run, "measure", slow)
    monkeypatch.setattr(questions.run.time, "monotonic", lambda: now[0])
    run = questions.Run(device, True, CEILINGS, lambda text: None)
    run.begin(40.0)
    run.compare("reference", "forward", [])
    assert run.late == is_late


@pytest.mark.parametrize("name", others.FLA)
def test_fla_says_that_it_wants_a_gpu(name: str) -> None:
    with pytest.raises(UnavailableError, match="GPU"):
        peers.prepare(name, Shape(1, 1, 64), "forward", "cpu")


def fake_fla(name: str, **shape: Any) -> Any:
    """What fla's functions of these names compute, by its documentation, with their layout and signatures."""

    def heads_first(function: Any) -> Any:
        return lambda *x: function(*(y.transpose(1, 2) for y in x)).transpose(1, 2)

    def scores(similarity: Any, eps: float, normalize: bool = True) -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            sim = similarity(q @ k.mT).tril()
            return sim @ v / (sim.sum(-1, keepdim=True) + eps if normalize else 1)

        return heads_first(attend)

    def parallel_rebased(q: Any, k: Any, v: Any, eps: float = 1e-5, use_scale: bool = True) -> Any:
        return scores(torch.square, eps)(q * q.shape[-1] ** -0.5, k, v)

    def fused_chunk_based(q: Any, k: Any, v: Any, scale: Any = None, use_norm: bool = True) -> Any:
        return scores(lambda u: 1 + u + u * u / 2, 1e-6)(q * q.shape[-1] ** -0.5, k, v)

    def chunk_linear_attn(q: Any, k: Any, v: Any, scale: Any = None, normalize: bool = True) -> Any:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return scores(lambda u: u, 1e-10, normalize)(q * scale, k, v), None

    return locals()[name]


@pytest.mark.parametrize(
    ("name", "feature_map"), [(name, x) for name, (_, maps) in others.FLA.items() for x in maps]
)
def test_fla_adapters_against_stand_ins(name: str, feature_map: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # on the adapters' side only: whether fla computes this is checked where it is timed
    function = name.split()[1]
    module = types.SimpleNamespace(**{function: fake_fla(function)})
    monkeypatch.setattr(others.importlib, "import_module", lambda _: module)
    shape = Shape(2, 2, 100, feature_map)
    attention = others.function(name, shape, "cuda", build=False)
    tensors = [x.detach().double() for x in peers.projections(shape, "cpu")]
    q, k, v = (peers.split_heads(x, 2) for x in tensors[:3])
    options = {"feature_map": feature_map, "layer_norm": "token"}
    expected = reference.quadratic(q, k, v, *tensors[3:], **options, eps=1e-6)
    assert isinstance(expected, torch.Tensor)
    assert timing.relative_error(attention(*tensors), expected) < 1e-11


def test_a_peer_that_is_not_installed_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla.ops.rebased", None)
    with pytest.raises(UnavailableError, match="not installed"):
        others.function("fla parallel_rebased", SMALL, "cuda", build=False)


def test_fast_transformers_that_was_never_built_is_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fast_transformers, "FOLDER", tmp_path)
    with pytest.raises(UnavailableError, match="not built"):
        peers.prepare(others.FAST_TRANSFORMERS, Shape(1, 1, 64), "forward", "cpu", build=False)


def test_a_build_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_transformers, "SECONDS", 0.2)
    monkeypatch.setattr(fast_transformers.sys, "executable", "/bin/sleep")
    monkeypatch.setattr(fast_transformers, "_COMMAND", ("30",))
    begin = time.monotonic()
    assert "more than" in fast_transformers._build()
    assert time.monotonic() - begin < 5


@pytest.mark.skipif(not fast_transformers.library().exists(), reason="fast-transformers was never built here")
@pytest.mark.parametrize("feature_map", ["outer", "square"])
def test_fast_transformers_computes_the_same(feature_map: str) -> None:
    prepared = peers.prepare(others.FAST_TRANSFORMERS, Shape(2, 2, 100, feature_map), DIRECTIONS[1], "cpu")
    assert prepared.error() <= prepared.bound
    prepared.run()


def test_scores_that_take_too_long_are_left_out() -> None:
    for name in (peers.SDPA, peers.QUADRATIC):
        with pytest.raises(UnavailableError, match="left out"):
            peers.prepare(name, Shape(1, 1, 131072), "forward", "cpu")


@pytest.mark.skipif(build_info()["cpu_instruction_set"] == "portable", reason="one instruction set")
def test_a_worker_has_its_own_instruction_set() -> None:
    shape = Shape(1, 1, 64, threads=1)
    with worker.Worker("portable") as portable:
        (row,) = measure("q", "forward", [portable.method(shape, "forward")], "cpu", 0.01)
    assert row.status == "ok"
    assert row.method == f"{OURS}, portable"
    with worker.Worker("portable") as pretender:
        pretender.instruction_set = "avx1024"
        (row,) = measure("q", "forward", [pretender.method(shape, "forward")], "cpu", 0.01)
    assert row.status == "this processor or build gives portable instead"


def test_decoding_rows() -> None:
    rows = {row.method: row for row in decoding.compare(a_run(), 2, "square")}
    assert all(row.status == "ok" for row in rows.values())
    assert rows[OURS].over_floor is not None
    assert rows[decoding.COPY].over_floor is None


def test_a_question_whose_time_is_over_says_so() -> None:
    run = a_run()
    run.begin(-1.0)
    rows = list(run.ask("q", [SMALL], (OURS, peers.LOOP)))
    assert len(rows) == 4
    assert all(row.status.startswith("left out") for row in rows)


def a_peer(question: str, method: str, ratio: float, seqlen: int = 128) -> dict[str, Any]:
    shape = asdict(Shape(1, 12, seqlen, threads=2))
    row = Row(question, shape, "forward", method, seconds=(1.0,), median=ratio, spread=0.1, ratio=ratio)
    return row.to_json()


def test_ratios_take_the_best_plain_form_of_a_shape_and_the_worse_of_two_questions() -> None:
    rows = [a_peer("q", OURS, 1.0), a_peer("q", peers.LOOP, 3.0), a_peer("q", peers.CUMSUM, 2.0)]
    rows += [a_peer("q", peers.SDPA, 0.5), a_peer("p", OURS, 1.0), a_peer("p", peers.LOOP, 0.9)]
    rows += [a_peer("q", OURS, 1.0, 64), a_peer("q", peers.LOOP, 0.1, 64)]  # shorter than what is promised
    rows += [a_peer("r", peers.LOOP, 0.2, 256)]  # ours is not there
    (found,) = nothing_slower.ratios(rows)
    assert (found.method, found.ratio) == (peers.LOOP, 0.9)


def test_ratios_name_where_the_op_is_slower(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_ratios([a_peer("q", OURS, 1.0), a_peer("q", peers.LOOP, 0.5)])
    printed = capsys.readouterr().out
    assert "faster at 1 of 1 shapes and directions:\n  outer (1, 12, 128) 2 threads, forward" in printed


def test_the_best_of_each_kind_of_peer() -> None:
    rows = [a_peer("q", OURS, 1.0) | {"over_floor": 1.5}, a_peer("q", peers.SDPA, 9.0)]
    rows += [a_peer("q", peers.LOOP, 3.0), a_peer("q", peers.CUMSUM, 2.0)]
    rows += [a_peer("p", OURS, 1.0), a_peer("p", peers.SDPA, 8.0)]  # the same shape, asked again
    rows += [a_peer("r", OURS, 4.0), a_peer("r", others.FAST_TRANSFORMERS, 0.1)]  # in units of another call
    (found,) = report._best_peers(rows).values()
    assert found == {"ours": 1.0, report.FLOOR: 1.5, "softmax attention": 8.0, "plain PyTorch": 2.0}


def test_targets() -> None:
    floor = a_peer("reference", OURS, 1.0, 4096) | {"over_floor": 1.2}
    rows = [floor, a_peer("reference", peers.SDPA, 20.0, 4096)]
    rows += [a_peer("reference", peers.LOOP, 4.0, 4096), a_peer("reference", peers.CUMSUM, 2.0, 4096)]
    found = {target.name.split(": ")[1]: target for target in targets.targets(rows)}
    assert {name: target.held for name, target in found.items() if "outer" not in name} == {
        "over the floor": False,
        peers.SDPA: True,
        peers.CUMSUM: False,
    }
    assert found[peers.CUMSUM].value == 2.0
    assert targets.targets([]) == []


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
        "machine": timing.machine(),
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
    fla = next(iter(others.FLA))

    def tiny(run: Run) -> Any:
        yield from run.ask("length", [Shape(1, 2, 128), Shape(1, 2, 256)], (*run.few, fla))

    monkeypatch.setitem(questions.QUESTIONS, "length", Question("tiny", (60.0, 60.0), tiny))
    better = Ceilings({name: 2 * rate for name, rate in CEILINGS.flops.items()}, CEILINGS.copy_bytes / 2)
    measured = iter((CEILINGS, better))  # before and after: the better rate of each counts
    monkeypatch.setattr("benchmarks.speed.ceilings.measure", lambda device: next(measured))
    path = tmp_path / "speed.json"
    assert command.main(["--quick", "--only", "length", "--output", str(path)]) == 0
    contents = json.loads(path.read_text())
    assert len(contents["rows"]) == 2 * 2 * 6
    assert {"commit", "machine", "ceilings", "version", "when", "peers"} <= set(contents)
    limits = Ceilings(better.flops, CEILINGS.copy_bytes)
    assert contents["ceilings"] == limits.to_json()
    ours = [row for row in contents["rows"] if row["method"] == OURS]
    floors = [harness.floor_seconds(Shape(**row["shape"]), row["direction"], limits) for row in ours]
    assert [row["over_floor"] for row in ours] == pytest.approx(
        [row["median"] / floor for row, floor in zip(ours, floors, strict=True)]
    )
    printed = capsys.readouterr().out
    assert "outer (1, 2, 256)" in printed
    assert f"{fla}: runs on a GPU only" in printed
    assert "Against the floor, and the best of each kind of peer" in printed
    assert "of 4 shapes and directions" in printed
    assert "figures held" not in printed
    assert list(contents["seconds_by_question"]) == ["length"]
    assert command.main(["show", str(path)]) == 0
    assert capsys.readouterr().out.strip() in printed
    monkeypatch.setattr(targets, "targets", lambda rows: [targets.Target("a figure", 1.0, 2.0)])
    assert command.main(["--targets", "show", str(path)]) == 0
    assert "0 of 1 figures held" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert command.main(["plot", str(path)]) == 0
    assert all(Path(line).stat().st_size > 1000 for line in capsys.readouterr().out.split())


@torch.no_grad()
def test_steps_without_mixing_leave_out_what_they_say() -> None:
    layer, convolution, x = ReBasedAttention(16, 2, 4), GatedShortConvolution(16), torch.randn(3, 16)
    state = RebasedState.zeros(3, 2, 4, 8)
    window = torch.zeros(3, 16, convolution.kernel_size - 1)
    with generation.without_mixing():
        assert layer.step(x, state).shape == x.shape
        assert convolution.step(x, window) is x
    assert not state.kv.any()
    assert not window.any()
    layer.step(x, state)
    convolution.step(x, window)
    assert state.kv.any()
    assert window.any()


def test_what_a_token_of_a_model_costs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = generation.measure(tiny_model(), prompt=20, tokens=5, rounds=2)
    assert min(seconds.prefill, seconds.step, seconds.bare_step, *seconds.recomputed) > 0
    # 1.25 + 255 / 100, and 256 times the mean of 2 and 4
    given = generation.Seconds(prefill=1.25, step=0.01, bare_step=0.008, recomputed=(2.0, 4.0))
    monkeypatch.setattr(generation, "measure", lambda *_: given)
    monkeypatch.setattr(generation, "RebasedForCausalLM", lambda _: torch.nn.Identity())
    generation.main([])
    told = capsys.readouterr().out
    assert "from states 3.8 s, each computed again 768.0 s, 202 times as long" in told
    assert "a step 10.0 ms, 20% of it step operators and convolutions" in told
