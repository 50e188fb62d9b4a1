"""The model of the CUDA kernels' time: its arithmetic, what goes into it and that all of it is shown."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import gpu_facts, gpu_model, predict
from benchmarks.speed.gpu_model import Gpu, Input, Kernel, Work
from benchmarks.speed.harness import OURS

RATES = {
    "multiprocessors": 10,
    "clock": 1e9,
    "schedulers": 4,
    "copy": 1e12,
    "copy_share": 1.0,
    "L2": 2e12,
    "matmul": 1e14,
    "mma.sync": 4.096e13,
    "issue_of_a_warp": 0.25,
    "issue_at_most": 0.4,
    "launch": 1e-6,
}
GPU = Gpu("round numbers", tuple(Input(name, value, "", "this test") for name, value in RATES.items()))
KERNEL = Kernel("kernel", blocks_per_multiprocessor=2, warps=4, chunk_instructions=1000, chunk_mma=100)
WORK = Work(KERNEL, blocks=25, chunks=3, bytes=2e6, sector_bytes=8e6)


@pytest.fixture(scope="module")
def facts() -> predict.Facts:
    return predict.load()


def test_a_case_by_hand() -> None:
    # 25 blocks, 20 at a time: 2 blocks on the fullest multiprocessor, then 1.
    # issue: 8 warps x 3 x 1000 instructions at 4 x min(2 x 0.25, 0.4) a ns: 15 us; 4 warps at 4 x 0.25: 12 us
    # tensor: (8 + 4) warps x 3 x 100 mma x 4096 FLOP, a tenth of 4.096e13 FLOP/s each: 3.6 us
    time = gpu_model.predict(GPU, WORK)
    assert time.seconds_of == pytest.approx({"memory": 2e-6, "L2": 4e-6, "issue": 27e-6, "tensor": 3.6e-6})
    assert time.waves == 1.25
    assert time.bound == "issue"
    assert time.predicted == pytest.approx(28e-6)
    assert time.at_most == pytest.approx(37.6e-6)


def faster(gpu: Gpu, name: str) -> Gpu:
    better = 0.5 if name == "launch" else 2
    changed = (replace(x, value=x.value * better) if x.name == name else x for x in gpu.inputs)
    return replace(gpu, inputs=tuple(changed))


@pytest.mark.parametrize("name", [name for name in RATES if name not in ("schedulers", "matmul")])
def test_a_better_card_takes_less_time(name: str) -> None:
    for work in (WORK, replace(WORK, blocks=20), replace(WORK, bytes=1e9), replace(WORK, sector_bytes=1e9)):
        before, after = gpu_model.predict(GPU, work), gpu_model.predict(faster(GPU, name), work)
        assert after.predicted <= before.predicted
        assert after.at_most <= before.at_most
    assert gpu_model.predict(faster(GPU, name), WORK).at_most < gpu_model.predict(GPU, WORK).at_most


@pytest.mark.parametrize("name", ["blocks", "chunks", "bytes", "sector_bytes", "launches"])
def test_more_work_takes_more_time(name: str) -> None:
    more = replace(WORK, **{name: 2 * getattr(WORK, name)})
    assert gpu_model.predict(GPU, more).at_most > gpu_model.predict(GPU, WORK).at_most
    assert gpu_model.predict(GPU, more).predicted >= gpu_model.predict(GPU, WORK).predicted


@pytest.mark.parametrize("name", ["chunk_instructions", "chunk_mma"])
def test_more_instructions_take_more_time(name: str) -> None:
    more = replace(WORK, kernel=replace(KERNEL, **{name: 2 * getattr(KERNEL, name)}))
    assert gpu_model.predict(GPU, more).at_most > gpu_model.predict(GPU, WORK).at_most


@pytest.mark.parametrize("feature_map", predict.MAPS)
@pytest.mark.parametrize("sweep", predict.SWEEPS)
@pytest.mark.parametrize("segments", [1, 4])
def test_the_traced_shape_moves_what_was_traced(
    facts: predict.Facts, feature_map: str, sweep: str, segments: int
) -> None:
    shape = replace(predict.shape_of("R1", feature_map), batch=1, heads=1, seqlen=facts.traced_tokens)
    works = list(predict.launches(facts, shape, sweep, segments))
    traced = facts.kernels(sweep, feature_map, segments)
    assert [x.bytes / shape.seqlen for x in works] == pytest.approx([x["bytes"] for x in traced.values()])
    sectors = [x["sector_bytes"] for x in traced.values()]
    assert [x.sector_bytes / shape.seqlen for x in works] == pytest.approx(sectors)


def test_longer_segments_move_less_for_states(facts: predict.Facts) -> None:
    shape = predict.shape_of("R2", "outer")  # 33 segments of 3972 tokens; 1024 were traced
    tokens = shape.batch * shape.heads * shape.seqlen
    long = sum(x.bytes for x in predict.launches(facts, shape, "forward", 33)) / tokens
    traced = sum(x["bytes"] for x in facts.kernels("forward", "outer", 4).values())
    whole = sum(x["bytes"] for x in facts.kernels("forward", "outer", 1).values())
    assert whole < long < traced


def test_the_instance_is_that_of_the_shapes() -> None:
    def chosen(*names: str) -> list[str]:
        return [name for name in names if gpu_facts._is_instance(name, "forward_kernel", "outer")]

    right = [
        "tensor_core::polynomial::forward_kernel<bfloat16, outer, 16, 128, false>",
        "polynomial::forward_kernel<bfloat16, outer, 16, 128, false>",
    ]
    wrong = ["forward_kernel<float16, outer, false>", "forward_kernel<bfloat16, square, false>"]
    wrong += [x.replace("128", "64") for x in right] + [x.replace("false", "true") for x in right]
    wrong += ["forward_kernel<bfloat16, outer, true>", "forward_kernel<bfloat16, outer, 8, false>"]
    wrong += ["grad_q_kernel<bfloat16, outer, false>", "general_forward<bfloat16>"]
    assert chosen(*right, *wrong) == right
    square = "tensor_core::elementwise::forward_kernel<bfloat16, square, 16, false>"
    assert gpu_facts._is_instance(square, "forward_kernel", "square")
    assert not gpu_facts._is_instance(square.replace("elementwise::", ""), "forward_kernel", "square")
    assert gpu_facts._is_instance(square.replace("elementwise::forward", "grad_q"), "grad_q_kernel", "square")
    assert gpu_facts._is_instance("step_kernel<bfloat16, 1>", "step_kernel", "outer")
    assert not gpu_facts._is_instance("step_kernel<bfloat16, 4>", "step_kernel", "outer")


def test_a_step_is_its_state_once_read_and_once_written(facts: predict.Facts) -> None:
    made = [x for x in predict.predictions(facts, gpu_model.GPUS[0]) if x.direction == "step"]
    outer = next(x for x in made if x.sizes["feature_map"] == "outer")
    assert outer.floor * 3.0e12 == pytest.approx(256 * 12 * 136 * 65 * 4 * 2)
    card = gpu_model.GPUS[0]
    assert outer.predicted == pytest.approx(outer.floor / card["copy_share"] + card["launch"])


def test_floors_are_those_of_the_kernels_plan() -> None:
    card = gpu_model.GPUS[0]
    wanted = {("R1", "forward"): 42, ("R1", "backward"): 84, ("R2", "forward"): 170, ("M128", "forward"): 203}
    for (size, sweep), microseconds in wanted.items():
        least = predict.floor(card, predict.shape_of(size, "outer"), sweep)
        assert least * 1e6 == pytest.approx(microseconds, rel=0.02)


def a_measurement(folder: Path, card: str, feature_map: str, direction: str, median: float) -> None:
    shape = predict.shape_of("R1", feature_map)
    row = {"question": "reference", "direction": direction, "method": OURS, "status": "ok", "median": median}
    row["shape"] = vars(shape) | {"threads": 1}
    contents = {"device": "cuda", "machine": {"gpus": [card]}, "rows": [row]}
    path = folder / card.replace(" ", "_") / f"{feature_map}-{direction}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(contents))


def test_measurements_are_set_against_predictions(facts: predict.Facts, tmp_path: Path) -> None:
    made = [x for gpu in gpu_model.GPUS for x in predict.predictions(facts, gpu)]
    assert predict.against_measured(made, tmp_path) == []
    a_measurement(tmp_path, "NVIDIA H100 80GB HBM3", "outer", "forward + backward", 1e-3)
    a_measurement(tmp_path, "NVIDIA A100", "outer", "forward", 1e-3)
    (tmp_path / "traffic.json").write_text("{}")
    (found,) = predict.against_measured(made, tmp_path)
    both = [x for x in made if (x.gpu, x.shape, x.sizes["feature_map"]) == ("H100", "R1", "outer")]
    assert found["predicted"] == pytest.approx(sum(x.predicted_with_token_norm for x in both))
    assert (found["shape"], found["direction"], found["measured"]) == ("R1", "forward + backward", 1e-3)


def test_other_paths_kernels_of_the_same_name_are_not_taken(facts: predict.Facts) -> None:
    names = [x["name"] for x in facts.registers]
    assert "float32_path::forward_kernel<outer>" in names
    assert facts.kernel("forward_kernel", "outer").name.startswith("tensor_core::")


def test_kernels_are_set_against_predictions(facts: predict.Facts, tmp_path: Path) -> None:
    made = list(predict.predictions(facts, gpu_model.GPUS[0]))
    sizes = {"size": "R1", "shape": asdict(predict.shape_of("R1", "outer"))}
    kernels = [
        {
            "kernel": "tensor_core::polynomial::forward_kernel<bfloat16, outer, 16, 128, false>",
            "launches": 1,
            "seconds": 1e-4,
        },
        {"kernel": "token_statistics<bfloat16>", "launches": 4, "seconds": 2e-5},
        {"kernel": "token_norm_backward<bfloat16>", "launches": 2, "seconds": 1e-5},
        {"kernel": "a kernel of torch", "launches": 1, "seconds": 1.0},
    ]
    times = {"forward": 2e-4, "forward_backward": 5e-4, "kernels": kernels}
    calls = [
        sizes | times | {"layer_norm": "token"},
        sizes | times | {"layer_norm": "head"},
        sizes | {"layer_norm": "token", "failed": "out of memory"},
    ]
    contents = {"machine": {"gpus": ["NVIDIA H100 80GB HBM3"]}, "calls": calls}
    (tmp_path / "kernels.json").write_text(json.dumps(contents))
    measured = {x["kernel"]: x["measured"] for x in predict.kernels_against_measured(made, tmp_path)}
    assert measured == {"forward_kernel": 1e-4, "token LayerNorm": pytest.approx(3e-5)}
    calls_measured = {x["direction"]: x["measured"] for x in predict.against_measured(made, tmp_path)}
    assert calls_measured == {"forward": 2e-4, "forward + backward": 5e-4}


def test_every_input_is_shown_and_all_is_called_a_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "predictions.json"
    assert predict.main(["--json", str(path)]) == 0
    printed = capsys.readouterr().out
    contents: dict[str, Any] = json.loads(path.read_text())
    assert printed.startswith("PREDICTIONS: no time below was measured")
    for gpu in gpu_model.GPUS:
        assert [x["name"] for x in contents["inputs"][gpu.name]] == [x.name for x in gpu.inputs]
        for x in gpu.inputs:
            assert x.name in printed
            assert f"{x.value:.4g}" in printed
            assert x.source in printed
    for file in (gpu_facts.REGISTERS, gpu_facts.INSTRUCTIONS, gpu_facts.TRAFFIC):
        assert file in printed
        assert file in contents["counted_by"]
    assert len(contents["predictions"]) == 2 * (4 * 2 * 2 + 2)
    for call in contents["predictions"]:
        assert call["predicted_seconds"] == pytest.approx(
            sum(x["predicted_seconds"] for x in call["kernels"])
        )
        assert call["floor_seconds"] <= call["predicted_seconds"] <= call["predicted_at_most_seconds"]
        for launched in call["kernels"]:
            assert launched["kernel"]["blocks_per_multiprocessor"] > 0
            assert launched["bytes"] > 0


def test_facts_that_are_missing_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (gpu_facts.REGISTERS, gpu_facts.INSTRUCTIONS, gpu_facts.TRAFFIC):
        contents = json.loads((predict.RESULTS / name).read_text())
        for run in contents.get("runs", []):
            del run["kernels"]
        (tmp_path / name).write_text(json.dumps(contents))
    arguments = ["--results", str(tmp_path), "--json", str(tmp_path / "predictions.json")]
    assert predict.main(arguments) == 1
    assert "no bytes per kernel" in capsys.readouterr().err
