"""What setup.py finds and says: torch, nvcc, versions that don't fit, architectures. No compiler is run."""

import json
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

import rebased_cuda

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source folder")


@pytest.fixture
def script(monkeypatch):
    """setup.py's functions, with setup() itself left out."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("REBASED_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def _fake_torch(folder: Path, version: str, cuda: str | None) -> None:
    (folder / "torch").mkdir(parents=True)
    text = f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n"
    (folder / "torch" / "version.py").write_text(text)


def _only_torch_in(monkeypatch, script, folder):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sysconfig.get_path", lambda *_, **__: str(folder))


def test_finds_this_torch_without_importing_it(script):
    root, version, cuda = script["find_torch"]()
    assert root == Path(torch.__file__).parent
    assert version == torch.__version__
    assert cuda == (torch.version.cuda or "")


def test_no_torch_is_one_sentence(script, monkeypatch, tmp_path):
    _only_torch_in(monkeypatch, script, tmp_path)
    with pytest.raises(SystemExit, match=r"no torch found .* Install torch 2.11 or later first"):
        script["find_torch"]()


def test_the_environment_that_uv_was_asked_to_fill_is_found(tmp_path):
    (tmp_path / "pyvenv.cfg").touch()
    build = (
        "import runpy, setuptools; setuptools.setup = lambda **_: None;"
        "print(runpy.run_path('setup.py')['environments']())"
    )
    installer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {build!r}], check=True)"
    command = [sys.executable, "-c", installer, "--python", str(tmp_path / "bin/python")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert repr(str(tmp_path)) in run.stdout


def test_old_torch_is_named(script, monkeypatch, tmp_path):
    _fake_torch(tmp_path, "2.9.1+cpu", None)
    _only_torch_in(monkeypatch, script, tmp_path)
    with pytest.raises(SystemExit, match=r"torch 2.9.1\+cpu .* too old: 2.11"):
        script["find_torch"]()


def test_cuda_version_of_torch_is_read(script, monkeypatch, tmp_path):
    _fake_torch(tmp_path, "2.13.0+cu130", "13.0")
    _only_torch_in(monkeypatch, script, tmp_path)
    assert script["find_torch"]()[1:] == ("2.13.0+cu130", "13.0")


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.99'\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return nvcc


def test_wrong_cuda_major_names_both_versions(script, fake_nvcc):
    with pytest.raises(SystemExit, match=r"nvcc is CUDA 12.4 .* built for CUDA 13.0"):
        script["find_nvcc"]("13.0")


def test_same_cuda_major_or_a_cpu_torch_is_fine(script, fake_nvcc):
    assert script["find_nvcc"]("12.8") == str(fake_nvcc)
    assert script["find_nvcc"]("") == str(fake_nvcc)


def test_no_nvcc_builds_for_the_cpu_and_says_so(script, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert script["find_nvcc"]("13.0") == ""
    assert "building the CPU backend only" in capfd.readouterr().err
    monkeypatch.setenv("REBASED_CUDA", "1")
    with pytest.raises(SystemExit, match="REBASED_CUDA=1, but there is no nvcc"):
        script["find_nvcc"]("13.0")


def test_cuda_can_be_left_out(script, fake_nvcc, monkeypatch):
    monkeypatch.setenv("REBASED_CUDA", "0")
    assert script["find_nvcc"]("13.0") == ""


def test_architectures(script, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0+PTX")
    assert script["architectures"]() == "86-real;90"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0 9.0a 10.0f+PTX")  # as containers set it
    assert script["architectures"]() == "90-real;100"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "hopper")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: .*'hopper'"):
        script["architectures"]()


def test_jobs_are_bounded(script, monkeypatch):
    assert script["jobs"]() >= 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert script["jobs"]() == 7


def test_build_info_has_the_facts():
    info = rebased_cuda.build_info()
    assert info["cpu_backend"] in ("native", "emulated")
    assert info["cpu_instruction_set"] in ("avx512_amx", "avx512_bf16", "avx512", "avx2", "portable")
    assert bool(info["cuda_architectures"]) == info["cuda"]
    assert info["torch_version"].startswith("2.")


def test_version_is_the_package_s():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{rebased_cuda.__version__}"' in text


def test_every_folder_of_the_package_is_installed():
    listed = next(
        x for x in (ROOT / "pyproject.toml").read_text().splitlines() if x.startswith("packages = ")
    )
    folders = (x.parent for x in (ROOT / "rebased_cuda").rglob("__init__.py"))
    expected = sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)
    assert re.findall('"(.*?)"', listed) == expected


# no other package of that name is found then, while torch is loaded already
ALONE = "import sys, torch; sys.path[:] = ['']; import rebased_cuda"


def _import_error(folder: Path, *search: Path, code: str = "import rebased_cuda") -> str:
    """The last line of what `import rebased_cuda` says with `folder` first, as Python is started in it."""
    path = os.pathsep.join(str(x) for x in search)
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "partially initialized" not in run.stderr  # what Python itself says, and helps nobody
    return run.stderr.splitlines()[-1]


def _copy_of_the_package(folder: Path, *left_out: str) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", *left_out)
    return shutil.copytree(Path(rebased_cuda.__file__).parent, folder / "rebased_cuda", ignore=ignored)


def test_a_source_folder_that_hides_the_installed_package_says_so(tmp_path):
    source = _copy_of_the_package(tmp_path / "source", "*.so")
    installed = _copy_of_the_package(tmp_path / "installed")
    said = _import_error(source.parent, installed.parent)
    assert said.startswith(f"ImportError: {source} is source code without a compiled part")
    assert str(installed) in said
    assert said.endswith(f"start Python in another folder, or run `pip install -e .` in {source.parent}.")


def test_a_source_folder_that_was_never_built_says_so(tmp_path):
    _copy_of_the_package(tmp_path, "*.so")
    said = _import_error(tmp_path, code=ALONE)
    assert said.endswith(f"is source code without a compiled part: run `pip install -e .` in {tmp_path}.")


def test_the_operators_serve_a_python_without_a_module(tmp_path):
    _copy_of_the_package(tmp_path, "_C.*")
    code = """
import rebased_cuda, torch
x = torch.randn(1, 1, 5, 4)
assert rebased_cuda.rebased_attention(x, x, x).shape == x.shape
print(rebased_cuda.build_info()["torch_version"])
try:
    import rebased_cuda.testing
except ImportError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    version, said = run.stdout.splitlines()
    assert version == rebased_cuda.build_info()["torch_version"]
    assert said.startswith("rebased_cuda: this install has no module for Python 3.")


def test_operator_and_module_tell_the_same_facts():
    module = sys.modules["rebased_cuda._C"]
    assert json.loads(torch.ops.rebased_cuda.build_info()) == module.build_info()


def test_a_compiled_part_that_does_not_load_says_why(tmp_path):
    source = _copy_of_the_package(tmp_path, "librebased_cuda.so")
    (source / "librebased_cuda.so").touch()
    said = _import_error(tmp_path)
    assert said.startswith("ImportError: rebased_cuda's compiled part does not load under torch")
    assert "file too short" in said
    assert said.endswith("reinstall it for this Python.")


LIBRARY = Path(rebased_cuda.__file__).parent / "librebased_cuda.so"


def _undefined_symbols() -> set[str]:
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[-1].split("@")[0] for line in listing.splitlines()}


needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")


@needs_nm
def test_the_library_of_operators_has_no_symbol_of_python():
    undefined = _undefined_symbols()
    assert "malloc" in undefined or any("aoti_torch" in name for name in undefined)
    assert [name for name in undefined if re.match(r"_?Py[A-Z_]", name)] == []


@needs_nm
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_library_asks_nothing_of_torch_that_2_11_lacks():
    root = Path(torch.__file__).parent
    wanted = {name for name in _undefined_symbols() if re.match(r"(aoti_)?torch_", name)}
    assert len(wanted) > 10
    shims = ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h", "inductor/aoti_torch/generated/c_shim_aten.h")
    headers = "".join(f"#include <torch/csrc/{name}>\n" for name in shims)
    flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-isystem{root / 'include'}"]
    declared = subprocess.run(
        ["g++", "-std=c++17", "-E", *flags, "-x", "c++", "-"],
        input=headers, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    # a weak symbol of a later torch, which is null under an earlier one
    later = {"torch_exception_get_what_without_backtrace"}
    assert {name for name in wanted if not re.search(rf"\b{name}\b", declared)} <= later
