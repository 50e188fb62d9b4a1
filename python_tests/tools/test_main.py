"""`python -m rebased_cuda`: that it passes, and that it can fail."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import EMULATED

import rebased_cuda
from rebased_cuda import __main__ as main_module
from rebased_cuda import rebased_attention
from rebased_cuda.demo import checks, guidance, training
from rebased_cuda.demo.report import Report

pytestmark = [
    pytest.mark.skipif(EMULATED, reason="the main job runs on the backends that users have"),
    pytest.mark.usefixtures("one_thread"),
]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
        env=os.environ | environment,
    )


def failures(report: Report) -> list[str]:
    return [check["name"] for check in report.checks if not check["passed"]]


def test_gradcheck_only_prints_one_json_object() -> None:
    result = run("-m", "rebased_cuda", "--gradcheck-only", "--json", "--device", "cpu", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["passed"]
    assert len(summary["checks"]) == 12
    assert summary["build"]["cpu_instruction_set"] in result.stderr
    assert "gradcheck elu, layer_norm=head" in result.stderr


def test_runs_without_rich() -> None:
    code = (
        "import sys; sys.modules['rich'] = sys.modules['rich.console'] = None; import rebased_cuda.__main__"
    )
    code += " as m"
    result = run(
        "-c",
        f"{code}; assert m.Report()._console is None; m.main(['--gradcheck-only', '--device', 'cpu'])",
        OMP_NUM_THREADS="1",
    )
    assert result.returncode == 0, result.stderr
    assert "12 of 12 checks passed" in result.stdout


def wrong_gradient(*arguments: Any, **options: Any) -> Any:
    """The right value with a gradient 1 % too large."""
    result = rebased_attention(*arguments, **options)
    y = result[0] if isinstance(result, tuple) else result
    y = y + 0.01 * (y - y.detach())
    return (y, result[1]) if isinstance(result, tuple) else y


def wrong_value(*arguments: Any, **options: Any) -> Any:
    result = rebased_attention(*arguments, **options)
    return result if isinstance(result, tuple) else result * (1 + 1e-5)


def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checks, "rebased_attention", wrong_gradient)
    assert main_module.main(["--gradcheck-only", "--json", "--device", "cpu"]) == 1
    summary = json.loads(capsys.readouterr().out)
    assert not summary["passed"]
    assert all(not check["passed"] for check in summary["checks"])


def test_an_exception_is_a_failure_with_a_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(main_module, "gradcheck", broken)
    assert main_module.main(["--gradcheck-only", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED Gradients" in printed
    assert "out of luck" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("function", "failing"),
    [
        (rebased_attention, []),
        (wrong_value, ["forward float32", "forward float64"]),
        (wrong_gradient, ["backward float32"]),
    ],
)
def test_accuracy_finds_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, function: Any, failing: list[str]
) -> None:
    monkeypatch.setattr(checks, "rebased_attention", function)
    report = Report()
    checks.accuracy(report, "cpu", "outer", seqlen=300)
    assert len(report.checks) == 4
    assert failures(report) == [f"outer {name}" for name in failing]


def test_a_step_that_forgets_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*arguments: Any, **options: Any) -> torch.Tensor:
        state = rebased_cuda.RebasedState(*(x.clone() for x in arguments[3]))
        return rebased_cuda.rebased_attention_step(*arguments[:3], state, *arguments[4:], **options)

    monkeypatch.setattr(checks, "rebased_attention_step", forgetful)
    report = Report()
    checks.accuracy(report, "cpu", "square", seqlen=300)
    assert failures(report) == [f"square prefill of {300 - checks.DECODED}, then 64 steps, float32"]


def test_nan_fails() -> None:
    report = Report()
    assert not report.check("a number", float("nan"), 1.0)
    assert not report.passed
    json.dumps(report.checks, allow_nan=False)


def test_training_that_learns_nothing_and_a_wrong_step_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    step = training.Hybrid.step
    monkeypatch.setattr(training, "MINIMUM_STEPS", 1)
    monkeypatch.setattr(training.Hybrid, "step", lambda *arguments: step(*arguments).roll(1, -1))
    report = Report()
    training.training(report, "cpu", 0.0)
    assert len(failures(report)) == len(report.checks) == 4


@pytest.mark.skipif(rebased_cuda.build_info()["cuda"] and torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_module.main(["--gradcheck-only", "--device", "cuda"]) == 1
    assert "FAILED device cuda" in capsys.readouterr().out


@pytest.mark.slow
def test_everything() -> None:
    result = run("-m", "rebased_cuda", "--json", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert len(summary["checks"]) == 24
    assert summary["training"]["final_loss"] < summary["training"]["unigram_entropy"]
    timed = {(row["case"], row["direction"]) for row in summary["speed"]}
    assert len(timed) == 4


def test_it_ends_with_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_module.main(["--gradcheck-only", "--device", "cpu"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line.split(":")[0].strip() for line in lines[-5:]] == ["GPU", "Next", "layer", "model", "docs"]
    assert rebased_cuda.ReBasedAttention(768)(torch.randn(1, 2, 768)).shape == (1, 2, 768)  # as `layer` says


H100, A100 = {"H100": (9, 0)}, {"A100": (8, 0)}
FOR_H100 = {"cuda": True, "cuda_architectures": "90-real"}


@pytest.mark.parametrize(
    ("built", "seen", "driver", "device", "said"),
    [
        ({"cuda": False}, {}, False, "cpu", "GPU: none here"),
        ({"cuda": False}, {}, True, "cpu", "GPU: NVIDIA's driver is installed, but this torch sees no GPU"),
        ({"cuda": False}, H100, True, "cpu", "GPU: H100 could be used, but this build has no CUDA kernels"),
        (FOR_H100, A100 | H100, True, "cuda", "GPU: A100 could be used, but this build is for 90-real only"),
        (FOR_H100, H100, True, "cuda", "GPU: H100, which this build is for"),
        (FOR_H100, H100, True, "cpu", "GPU: H100, which this build is for; this ran on cpu"),
    ],
)
def test_whether_a_gpu_could_be_used(built, seen, driver, device, said) -> None:
    line = guidance.gpu_verdict(built, seen, driver, device)
    assert line.startswith(said)
    assert "\n" not in line
    assert ("build again" in line) == ("could be used" in line)


@pytest.mark.parametrize(
    ("architectures", "runs_on", "does_not"),
    [
        ("80-real", [(8, 0), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("86-real 90", [(8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], [(8, 0)]),
        ("80-virtual", [(8, 0), (9, 0), (12, 1)], [(7, 5)]),
        ("90a-real", [(9, 0)], [(10, 0), (8, 0)]),
        ("", [], [(9, 0)]),
    ],
)
def test_which_gpus_an_architecture_runs_on(architectures, runs_on, does_not) -> None:
    assert all(guidance.runs_on(architectures, capability) for capability in runs_on)
    assert not any(guidance.runs_on(architectures, capability) for capability in does_not)
