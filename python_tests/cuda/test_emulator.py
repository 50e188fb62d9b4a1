"""The emulator's checkers are checked: faults are planted in a kernel, and each is seen by whom it should be.

Builds csrc/tests/emulator_* once for every checker (plain, address + undefined behaviour, thread, trace).
"""

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "csrc" / "tests"
PROGRAMS = {"trace": ["emulator_trace"]}
ORDERS = ["forward", "reverse", "1", "2"]

MISSING = [tool for tool in ("g++", "cmake", "ninja") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TESTS.is_dir(), reason="needs the source folder"),
    pytest.mark.skipif(
        platform.machine().lower() not in ("x86_64", "amd64"), reason="the emulator runs on x86-64 only"
    ),
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} on the PATH"),
]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(checker, program, *arguments, order=..., **environment); builds the checker's programs at first."""
    folders: dict[str, Path] = {}
    prefix: list[str] = []

    def build(checker: str) -> Path:
        folder = tmp_path_factory.mktemp(checker)
        programs = PROGRAMS.get(checker, ["emulator_faults", "emulator_primitives"])
        for command in (
            ["cmake", "-S", TESTS, "-B", folder, "-G", "Ninja", f"-DSANITIZER={checker}"],
            ["cmake", "--build", folder, "-j", "2", "--target", *programs],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        return folder

    def start(checker: str, program: str, *arguments: str, **environment: str):
        command = [*prefix, str(folders[checker] / program), *arguments]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("REBASED_EMULATOR")}
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=300,
            env=clean | {"TSAN_OPTIONS": "", **environment},
        )

    def run(checker: str, program: str, *arguments: str, order: str = "forward", **environment: str):
        if checker not in folders:
            folders[checker] = build(checker)
            if checker == "thread" and not prefix:
                # ThreadSanitizer has a fixed layout of memory, which some systems randomise too widely for it
                first = start(checker, "emulator_faults", "none")
                if "unexpected memory mapping" in first.stderr:
                    prefix.extend(["setarch", platform.machine(), "-R"])
        return start(checker, program, *arguments, REBASED_EMULATOR_ORDER=order, **environment)

    return run


class Seen(NamedTuple):
    """How a run must end: what the program prints, and what a sanitizer must report, naming which line."""

    prints: str | None  # a regular expression; None: a sanitizer ends the program before
    report: str = ""  # what the report must say; "": no report
    at: str = ""  # part of the source line that the report must name


RIGHT = Seen(r"right")
WRONG = Seen(r"wrong: \d+ values")


def error(text: str) -> Seen:
    return Seen(rf"error: .*{text}")


def race(at: str, prints: str = WRONG.prints) -> Seen:
    return Seen(prints, "ThreadSanitizer: data race", at)


DIVERGENT = r"divergent synchronisation, nobody can go on:"
SKIPPED_BARRIER = error(
    DIVERGENT + r"\n  at sync_threads \(emulator_faults.cuh:\d+\): threads 0-95"
    r"\n  at sync_threads \(emulator_faults.cuh:\d+\): threads 96-127"
)
RETURNED = error(
    DIVERGENT + r"\n  at sync_threads \(emulator_faults.cuh:\d+\): threads 0-95\n  returned: threads 96-127"
)
TWO_SHUFFLES = error(
    r"divergent warp collective in warp 0: lane \d+ is at shuffle \(emulator_faults.cuh:\d+\), "
    r"lanes [0-9a-f]{8} are at shuffle \(emulator_faults.cuh:\d+\)"
)
NEVER_AWAITED = error("returned with asynchronous copies never waited for")
PAST_SHARED = error("a write before the begin or past the end of a shared array")
OVERFLOW = "AddressSanitizer: heap-buffer-overflow"
IN_GLOBAL = "ldmatrix of 16 bytes: the address is not in shared memory"
IN_SHARED = "load of 16 bytes: the address is in shared memory"

# fault: seen by the plain run, by address + undefined, by thread
FAULTS = {
    "none": (RIGHT, RIGHT, RIGHT),
    "missing_block_barrier": (WRONG, WRONG, race("ldmatrix(")),
    "missing_barrier_before_write": (WRONG, WRONG, race("z[x]")),
    "missing_warp_barrier": (WRONG, WRONG, race("neighbours[thread ^ 1]")),
    "missing_copy_wait": (WRONG, WRONG, WRONG),  # reads NaN: a copy is put off to its wait
    "early_copy": (WRONG, WRONG, race("stage[(chunk + j) * width + thread]")),
    "forgotten_copy": (NEVER_AWAITED, NEVER_AWAITED, NEVER_AWAITED),
    "uninitialised_shared": (WRONG, WRONG, WRONG),  # reads NaN
    "write_past_shared": (
        PAST_SHARED,
        Seen(None, "AddressSanitizer: use-after-poison", "*past_z = 0"),
        race("*past_z = 0", PAST_SHARED.prints),
    ),
    "read_past_global": (RIGHT, Seen(None, OVERFLOW, "k[rows * width + thread % width]"), RIGHT),
    "copy_past_global": (RIGHT, Seen(None, OVERFLOW, "copy_async<16>(stages + 4 * thread"), RIGHT),
    "divergent_barrier": (SKIPPED_BARRIER, SKIPPED_BARRIER, race("copy_async<16>", SKIPPED_BARRIER.prints)),
    "early_return": (RETURNED, RETURNED, RETURNED),
    "divergent_shuffle": (TWO_SHUFFLES, TWO_SHUFFLES, TWO_SHUFFLES),
    "different_shuffles": (TWO_SHUFFLES, TWO_SHUFFLES, TWO_SHUFFLES),
    "shuffle_outside_mask": (error("lane 0 reads lane 16, which is not in mask 0000ffff"),) * 3,
    "racing_blocks": (None, None, race("totals[thread] += z[thread]", RIGHT.prints)),  # else a matter of luck
    "misaligned_vector": (error(r"emulator_faults.cuh:\d+: misaligned load of 16 bytes"),) * 3,
    "misaligned_pointer": (
        RIGHT,
        Seen(None, "runtime error: .*misaligned address", "reinterpret_cast<const float4*>(q + 1)"),
        RIGHT,
    ),
    "misaligned_matrix_row": (error(r"emulator_faults.cuh:\d+: misaligned ldmatrix of 16 bytes"),) * 3,
    "matrix_row_in_global": (error(r"emulator_faults.cuh:\d+: " + IN_GLOBAL),) * 3,
    "shared_as_global": (error(r"emulator_faults.cuh:\d+: " + IN_SHARED),) * 3,
    "failed_assertion": (error(r"thread \(70, 0, 0\): .*emulator_faults.cuh:\d+: thread != 70"),) * 3,
    "thrown_exception": (error(r"thread \(70, 0, 0\): planted"),) * 3,
}

LIMITS = {
    "too_much_dynamic_memory": error("bytes of shared memory: more than the 232448 of this device"),
    "much_dynamic_memory": RIGHT,
    "too_much_static_memory": error("64000 bytes of static shared memory: more than 48 KB"),
    "too_many_threads": error(r"block \(1056, 1, 1\): more than 1024 threads"),
    "too_large_grid": error(r"grid \(1, 65536, 1\): more than"),
    "empty_grid": error("a grid or block of size 0"),
}


def check(done: subprocess.CompletedProcess[str], seen: Seen) -> None:
    everything = done.stdout + done.stderr
    assert "the launch after it failed" not in everything
    if seen.prints is None:
        assert done.stdout == "", everything
        assert done.returncode != 0, everything
    else:
        assert re.match(seen.prints, done.stdout), everything
    if not seen.report:
        assert done.stderr == "", everything
        assert done.returncode == 0, everything
        return
    assert re.search(seen.report, done.stderr), everything
    assert done.returncode != 0, everything
    lines = (TESTS / "emulator_faults.cuh").read_text().splitlines()
    named = {lines[int(number) - 1] for number in re.findall(r"emulator_faults\.cuh:(\d+)", done.stderr)}
    assert any(seen.at in line for line in named), everything


def test_the_table_has_every_fault(run):
    assert run("none", "emulator_faults").stdout.split() == list(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("order", ORDERS)
def test_plain_run(run, fault, order):
    if FAULTS[fault][0] is not None:
        check(run("none", "emulator_faults", fault, order=order), FAULTS[fault][0])


@pytest.mark.parametrize("fault", FAULTS)
def test_address_and_undefined(run, fault):
    if FAULTS[fault][1] is not None:
        check(run("address", "emulator_faults", fault), FAULTS[fault][1])


@pytest.mark.parametrize("fault", FAULTS)
def test_thread(run, fault):
    check(run("thread", "emulator_faults", fault), FAULTS[fault][2])


@pytest.mark.parametrize("checker", ["address", "thread"])
@pytest.mark.parametrize("order", ORDERS[1:])
def test_no_false_alarm(run, checker, order):
    check(run(checker, "emulator_faults", "none", order=order), RIGHT)


@pytest.mark.parametrize("checker", ["none", "address"])
@pytest.mark.parametrize("name", LIMITS)
def test_limits(run, checker, name):
    check(run(checker, "emulator_faults", name), LIMITS[name])


@pytest.mark.parametrize(("kilobytes", "seen"), [("99", error("more than the 101376")), ("163", RIGHT)])
def test_smaller_devices(run, kilobytes, seen):
    setting = {"REBASED_EMULATOR_SHARED_MEMORY": kilobytes}
    check(run("none", "emulator_faults", "much_dynamic_memory", **setting), seen)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ORDER", "backward"), ("ORDER", "3x"), ("THREADS", "0"), ("THREADS", "many"), ("SHARED_MEMORY", "-1")],
)
def test_settings_are_checked(run, name, value):
    setting = {f"REBASED_EMULATOR_{name}": value}
    arguments = {"order": value} if name == "ORDER" else setting
    done = run("none", "emulator_faults", "none", **arguments)
    assert done.stdout.startswith(f"error: REBASED_EMULATOR_{name}={value}: n"), done.stdout


@pytest.mark.parametrize("threads", ["1", "3"])
def test_os_threads(run, threads):
    check(run("none", "emulator_faults", "none", REBASED_EMULATOR_THREADS=threads), RIGHT)


@pytest.mark.parametrize(
    ("checker", "order"),
    [("none", "forward"), ("none", "reverse"), ("none", "1"), ("address", "1"), ("thread", "1")],
)
def test_primitives(run, checker, order):
    done = run(checker, "emulator_primitives", order=order)
    assert (done.stdout, done.stderr, done.returncode) == ("right\n", "", 0)


# Per access of a warp, by arithmetic. Global: bytes, sectors, sectors enough. Shared: wavefronts, ideally.
GLOBAL = {
    "coalesced": ("read", 128, 4, 4),
    "sector_each": ("read", 128, 32, 4),
    "broadcast_global": ("read", 128, 1, 1),
    "vector": ("read", 512, 16, 16),
    "quarter": ("read", 32, 1, 1),
    "copy": ("read", 512, 16, 16),
    "copy_half": ("read", 256, 8, 8),
    "result": ("write", 128, 4, 4),
}
SHARED = {
    "no_conflict": ("write", 1, 1),
    "two_way": ("write", 2, 1),
    "worst": ("write", 32, 1),
    "padded": ("write", 1, 1),
    "broadcast_shared": ("read", 1, 1),
    "vector_shared": ("write", 4, 4),
    "halves": ("write", 1, 1),
    "fill": ("write", 1, 1),
    "ldmatrix_padded": ("read", 4, 4),
    "ldmatrix_conflict": ("read", 32, 4),
    "copy": ("write", 4, 4),
    "copy_half": ("write", 4, 4),
    "result": ("read", 4, 1),
}


def test_tracer(run):
    done = run("trace", "emulator_trace")
    assert done.returncode == 0, done.stderr
    trace = json.loads(done.stdout)
    source = (TESTS / "emulator_trace.cu").read_text().splitlines()
    (kernel,) = trace["kernels"]
    assert kernel["name"].endswith("known_accesses")
    assert kernel["launches"] == 2

    found = {"global": {}, "shared": {}}
    warps = 2 * 3 * 2  # launches, blocks, warps a block
    for line in kernel["lines"]:
        assert line["file"] == "emulator_trace.cu"
        mark = re.search(r"mark: (\w+)", source[line["line"] - 1])[1]
        times = line["warp_accesses"]
        assert times == (18 * warps if mark == "fill" else warps)
        keys = (
            ("wavefronts", "ideal_wavefronts")
            if line["memory"] == "shared"
            else ("bytes", "sectors", "ideal_sectors")
        )
        figures = [line[key] / times for key in keys]
        found[line["memory"]][mark] = (line["access"], *figures)
    assert found == {"global": GLOBAL, "shared": SHARED}

    buffers = {buffer["name"]: buffer for buffer in trace["buffers"]}
    reads = [figures for figures in GLOBAL.values() if figures[0] == "read"]
    assert buffers["input"]["read_bytes"] == warps * sum(figures[1] for figures in reads)
    assert buffers["input"]["read_sectors"] == warps * sum(figures[2] for figures in reads)
    assert buffers["input"]["written_bytes"] == 0
    assert buffers["output"]["written_sectors"] == warps * GLOBAL["result"][2]
    assert buffers["output"]["read_bytes"] == 0


def test_tracer_knows_its_lines_whatever_its_folder_is_called(run, tmp_path):
    """A folder's name is no command: neither its quote nor what stands in it reaches a shell."""
    folder = tmp_path / "it's $(touch started) `touch started`"
    folder.mkdir()
    built = run("trace", "emulator_trace")
    program = shutil.copy(built.args[-1], folder)
    done = run("trace", program)
    assert json.loads(done.stdout) == json.loads(built.stdout)
    assert not list(Path.cwd().glob("started"))
