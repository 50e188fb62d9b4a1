"""Memory traffic and bank conflicts of the tensor-core kernels, counted by the emulator's tracer."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from dataclasses import replace

import pytest

from benchmarks.kernels import traffic

MISSING = [tool for tool in ("g++", "cmake", "ninja") if shutil.which(tool) is None]
needs_emulator = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or bool(MISSING),
    reason=f"needs x86-64{''.join(', ' + tool + ' on the PATH' for tool in MISSING)}",
)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory):
    return {run.name: run for run in traffic.measure(tmp_path_factory.mktemp("traffic"))}


@pytest.mark.slow
@needs_emulator
@pytest.mark.parametrize("name", traffic.LIMITS)
def test_limits(figures, name):
    assert traffic.problems([figures[name]]) == []


@pytest.mark.slow
@needs_emulator
@pytest.mark.parametrize("name", [name for name in traffic.LIMITS if not name.endswith("float32")])
def test_every_access_covers_whole_sectors(figures, name):
    for buffer in figures[name].buffers:
        assert (buffer.sectors_read, buffer.sectors_written) == (buffer.read, buffer.written), buffer.name


@pytest.mark.slow
@needs_emulator
@pytest.mark.parametrize("feature_map", ["outer", "square"])
def test_few_segments_are_summed_without_a_scan(figures, feature_map):
    """Of four segments three write a state, and the last three read one, two and three of them."""
    if feature_map == "outer":  # 136 features by 64 columns, and the Gram matrix
        slot, sums = (136 * 64 + 16 * 16) * 4 / traffic.TOKENS, 0.0
    else:
        slot = 2 * 128 * 16 / traffic.TOKENS
        sums = 2 * 32 * 16 / traffic.TOKENS  # one warp writes them
    # in backward all four warps read the sums; in forward one warp does, a float for each lane
    read_sums = {"forward": 32 * 4 / traffic.TOKENS if sums else 0.0, "backward": 4 * sums}
    for sweep, names in (("forward", ["states"]), ("backward", ["states", "reverse states"])):
        moved = {b.name: (b.read, b.written) for b in figures[f"{sweep} {feature_map} 4"].buffers}
        for name in names:
            read, written = moved[name]
            assert read == 6 * (slot + read_sums[sweep])
            assert 3 * (slot + sums) <= written < 3 * (slot + sums) + 1


@pytest.mark.slow
@needs_emulator
@pytest.mark.parametrize("sweep", ["forward", "backward"])
@pytest.mark.parametrize(
    ("feature_map", "dtype"),
    [*((m, "") for m in traffic.FLOORS), ("outer", "float32"), ("square", "float32")],
)
def test_one_pass_moves_every_tensor_once_a_sweep(figures, sweep, feature_map, dtype):
    moved = {b.name: (b.read, b.written) for b in figures[f"{sweep} {feature_map} 1 {dtype}".strip()].buffers}
    floor = traffic.FLOAT32_FLOOR if dtype else traffic.FLOORS[feature_map]
    row, values = floor.row, floor.values
    sizes = {"q": row, "k": row, "v": values}
    sweeps = 1 if sweep == "forward" else 2
    expected = {name: (sweeps * size, 0) for name, size in sizes.items()}
    if sweep == "forward":
        expected |= {"y": (0, values), "r": (0, 4)}
    else:
        # a sequence's first chunk, of 128 tokens, makes delta from y
        y = values if floor.keys_read_y else values * 128 / traffic.TOKENS
        expected |= {"y": (y, 0), "grad q": (0, row), "grad k": (0, row), "grad v": (0, values)}
        expected |= {"grad y": (2 * values, 0), "r": (8, 0), "delta": (4, 4)}
        if dtype:  # delta is a launch of its own
            expected |= {"r": (12, 0), "delta": (8, 4)}
            expected["grad y"] = (3 * values, 0)
    assert {name: moved[name] for name in expected} == expected
    few = [name for name in moved if name not in expected]
    assert sum(sum(moved[name]) for name in few) < 1, "gamma, beta and their gradients' partial sums"


@pytest.mark.slow
@needs_emulator
def test_statistics_of_a_token_read_it_once(tmp_path):
    for command in (
        ["cmake", "-S", traffic.ROOT / "csrc/tests", "-B", tmp_path, "-G", "Ninja", "-DSANITIZER=trace"],
        ["cmake", "--build", tmp_path, "--target", "traffic_token_norm"],
    ):
        subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([tmp_path / "traffic_token_norm"], check=True, capture_output=True, text=True)
    runs = json.loads(done.stdout)
    assert len(runs) == 5
    for name, traced in runs.items():
        _, heads, dim = name.split()
        moved = {b["name"]: (b["read_bytes"], b["written_bytes"]) for b in traced["buffers"]}
        tokens = moved["statistics"][1] // 8
        assert tokens == 333
        assert moved == {"x": (2 * int(heads) * int(dim) * tokens, 0), "statistics": (0, 8 * tokens)}
        if int(dim) % 16 == 0:  # rows are whole sectors
            assert all(32 * b["read_sectors"] == b["read_bytes"] for b in traced["buffers"])


@pytest.mark.slow
@needs_emulator
def test_committed_figures(figures):
    """benchmarks/results/traffic.json is what its command would write."""
    committed = json.loads((traffic.ROOT / "benchmarks/results/traffic.json").read_text())
    assert committed["runs"] == [traffic.to_json(run) for run in figures.values()]


# ---- the checks themselves, with no compiler ----


def test_floors():
    floor = traffic.Floor()
    assert (floor.forward, floor.backward, floor.backward + floor.reverse_sums) == (324, 976, 1195)
    floor = traffic.FLOORS["outer"]
    assert (floor.forward, floor.backward, floor.backward + floor.reverse_sums) == (324, 848, 974)
    assert (traffic.FLOAT32_FLOOR.forward, traffic.FLOAT32_FLOOR.backward) == (644, 1936)


def test_problems_are_found():
    good = traffic.Figures(
        "forward square 1", [traffic.Buffer("q", 324, 0, 324, 0)], [traffic.Wavefronts("forward", 8, 8)]
    )
    assert traffic.problems([good]) == []
    more = replace(good, buffers=[traffic.Buffer("q", 324, 40, 324, 0)])
    assert traffic.problems([more]) == ["forward square 1: 1.123 times the floor, not 1.10"]
    halves = replace(good, buffers=[traffic.Buffer("q", 324, 0, 388, 0)])
    assert traffic.problems([halves]) == ["forward square 1: in sectors 1.198 times the floor, not 1.10"]
    conflict = replace(good, shared=[traffic.Wavefronts("forward", 9, 8)])
    assert traffic.problems([conflict]) == [
        "forward square 1: forward has bank conflicts, 9 wavefronts for 8"
    ]
    outer = replace(good, name="forward outer 1", shared=[traffic.Wavefronts("forward", 1035, 1000)])
    assert traffic.problems([outer]) == []
    more = replace(outer, shared=[traffic.Wavefronts("forward", 1036, 1000)])
    assert len(traffic.problems([more])) == 1
    assert len(traffic.problems([replace(outer, name="forward outer 1 float32")])) == 1
