"""Finds torch, nvcc and the GPU architectures, then lets CMake build; metadata is in pyproject.toml.

Environment: REBASED_CUDA=0 leaves the CUDA kernels out, =1 makes a missing nvcc an error; CUDA_HOME names the
toolkit; TORCH_CUDA_ARCH_LIST the architectures ("8.0;9.0+PTX"); MAX_JOBS or CMAKE_BUILD_PARALLEL_LEVEL the
parallel compilations; REBASED_LINEINFO=1 adds line numbers to the kernels, for profilers;
REBASED_EMULATOR=1 adds the kernels emulated on the CPU, for tests. CMAKE_CXX_COMPILER_LAUNCHER and
CMAKE_CUDA_COMPILER_LAUNCHER name a compiler cache, as in every CMake project.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from itertools import pairwise
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent.resolve()
MINIMUM_TORCH = (2, 11)
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


def say(message: str) -> None:
    print(f"rebased_cuda: {message}", file=sys.stderr, flush=True)


def environments() -> list[str]:
    """Folders of the Python environments that this build may be for, the likeliest first.

    pip builds with the environment's own Python. uv and `python -m build` build with a Python elsewhere and
    say nothing of the environment that they were asked to fill: the processes that started this one know, by
    uv's option --python, their VIRTUAL_ENV, their program, or, as uv does, the `.venv` in their folder.
    """
    found = [sys.prefix, sys.base_prefix, os.environ.get("VIRTUAL_ENV", "")]
    process = os.getppid()
    while process > 1 and Path(f"/proc/{process}/status").is_file():
        folder = Path(f"/proc/{process}")
        try:
            entries = (folder / "environ").read_text(errors="replace").split("\0")
            variables = dict(x.split("=", 1) for x in entries if "=" in x)
            program, *arguments = (folder / "cmdline").read_text(errors="replace").split("\0")
            cwd = (folder / "cwd").resolve()
            parent = re.search(r"^PPid:\s*(\d+)", (folder / "status").read_text(), re.MULTILINE)
        except OSError:  # another user's process
            break
        beside = (cwd / program).parent.parent
        candidates = [variables.get("VIRTUAL_ENV", ""), str(beside), str(cwd / ".venv")]
        for option, value in pairwise(arguments):
            if option in ("--python", "-p"):  # of uv: an environment or its Python
                path = cwd / value
                candidates = [str(path), str(path.parent.parent), *candidates]
        found += [x for x in candidates if x and Path(x, "pyvenv.cfg").is_file()]
        process = int(parent.group(1)) if parent else 0
    return list(dict.fromkeys(filter(None, found)))


def find_torch() -> tuple[Path, str, str]:
    """(folder, version, CUDA version or "") of this environment's torch, without importing it.

    Build isolation hides the environment's site-packages from sys.path, but not from the disk.
    """
    spec = importlib.util.find_spec("torch")
    roots = [Path(spec.origin).parent] if spec and spec.origin else []
    for base in environments():
        scheme = {"base": base, "platbase": base, "installed_base": base}
        roots.append(Path(sysconfig.get_path("platlib", vars=scheme)) / "torch")
    roots.append(Path(site.getusersitepackages()) / "torch")
    for root in roots:
        if not (root / "version.py").is_file():
            continue
        text = (root / "version.py").read_text()
        version = re.search(r"^__version__\b[^=]*=\s*'([^']+)'", text, re.MULTILINE)
        cuda = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", text, re.MULTILINE)
        if version is None:
            continue
        numbers = tuple(int(n) for n in version.group(1).split("+")[0].split(".")[:2])
        if numbers < MINIMUM_TORCH:
            raise SystemExit(
                f"rebased_cuda: torch {version.group(1)} in {root} is too old: 2.11 or later is needed."
            )
        return root, version.group(1), cuda.group(1) if cuda else ""
    raise SystemExit(
        "rebased_cuda: no torch found to build against (looked in "
        f"{', '.join(map(str, roots))}). Install torch 2.11 or later first, then run: "
        "pip install --no-build-isolation . (or set VIRTUAL_ENV to the environment that has torch)."
    )


def find_nvcc(torch_cuda: str) -> str:
    """The nvcc to build the CUDA kernels with, or "" for a CPU-only build."""
    wanted = os.environ.get("REBASED_CUDA", "")
    if wanted == "0":
        return ""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        if wanted == "1":
            raise SystemExit(
                "rebased_cuda: REBASED_CUDA=1, but there is no nvcc on PATH or in $CUDA_HOME/bin."
            )
        say("no nvcc on PATH or in $CUDA_HOME/bin: building the CPU backend only")
        return ""
    output = subprocess.run([nvcc, "--version"], text=True, capture_output=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", output)
    if release is None:
        raise SystemExit(f"rebased_cuda: {nvcc} --version names no release.")
    if torch_cuda and release.group(1).split(".")[0] != torch_cuda.split(".")[0]:
        raise SystemExit(
            f"rebased_cuda: nvcc is CUDA {release.group(1)} ({nvcc}), but this torch was built for CUDA "
            f"{torch_cuda}: their major versions must agree. Set CUDA_HOME to a CUDA "
            f"{torch_cuda.split('.')[0]} toolkit, or REBASED_CUDA=0 for a CPU-only build."
        )
    # a wrapper script on PATH is not the toolkit that CMake looks for: follow it to the real folder
    real = re.search(r"^#\$ TOP=(.*)$", dry_run(nvcc), re.MULTILINE)
    if real and (Path(real.group(1)) / "bin/nvcc").is_file():
        return str((Path(real.group(1)) / "bin/nvcc").resolve())
    return nvcc


def dry_run(nvcc: str) -> str:
    """What nvcc would run for an empty file: among it, its toolkit's folder."""
    return subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], text=True, capture_output=True, check=False
    ).stderr


def architectures() -> str:
    """TORCH_CUDA_ARCH_LIST, else those of the GPUs present, else 8.0 and 9.0 with PTX, in CMake's words."""
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";")
    if not names and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        result = subprocess.run(query, text=True, capture_output=True, check=False)
        names = ";".join(sorted(set(result.stdout.split()))) if result.returncode == 0 else ""
    words = []
    for name in (names or DEFAULT_ARCHITECTURES).split(";"):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)  # no kernel uses what 9.0a has beyond 9.0
        if not match:
            raise SystemExit(
                f"rebased_cuda: TORCH_CUDA_ARCH_LIST: expected names like 8.0 or 9.0+PTX, got {name!r}."
            )
        words.append(match[1] + match[2] + ("" if match[3] else "-real"))  # "90" is machine code and PTX
    return ";".join(dict.fromkeys(words))


def jobs() -> int:
    """MAX_JOBS or CMAKE_BUILD_PARALLEL_LEVEL, else as many as cores and memory (2 GB each) allow."""
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        value = os.environ.get(name, "")
        if value:
            if not value.isdecimal() or int(value) < 1:
                raise SystemExit(f"rebased_cuda: {name}: expected a number of compilations, got {value!r}.")
            return int(value)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory / 2)))


def find_compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++, clang++ on PATH; CMake looks at its version."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for name in wanted[-1:] or ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    what = f"CXX names {wanted[-1]}, which is not there" if wanted else "there is no C++ compiler on PATH"
    raise SystemExit(f"rebased_cuda: {what}: install g++ 11 or later, like `apt install g++`.")


def find_tool(name: str) -> str:
    """cmake or ninja: beside this Python (a venv need not be activated), else on PATH."""
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    tool = shutil.which(name, path=os.pathsep.join(folders))
    if tool is None:
        raise SystemExit(f"rebased_cuda: {name} is missing: pip install cmake ninja pybind11 first.")
    return tool


# The operators, with no symbol of Python, and the module that tells Python of builds and plans.
LIBRARY, MODULE = "rebased_cuda.librebased_cuda", "rebased_cuda._C"


class CMakeBuild(build_ext):
    """Builds both compiled parts in one run of CMake."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1] == LIBRARY.split(".")[-1]:
            return os.path.join(*fullname.split(".")) + ".so"  # of no Python in particular
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        tools = {name: find_tool(name) for name in ("cmake", "ninja")}
        try:
            import pybind11
        except ImportError:
            raise SystemExit("rebased_cuda: pybind11 is missing: pip install pybind11 first.") from None

        find_compiler()
        torch, torch_version, torch_cuda = find_torch()
        nvcc = find_nvcc(torch_cuda)
        output = Path(self.get_ext_fullpath(MODULE)).resolve()
        # build_temp may be new every time; what has not changed since the last build is not compiled again
        build = HERE / "build/cmake"
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            # given every time: an isolated build's ninja of last time is gone
            "CMAKE_MAKE_PROGRAM": tools["ninja"],
            "TORCH_ROOT": torch,
            "TORCH_VERSION": torch_version,
            "PYTHON_INCLUDE": sysconfig.get_path("include"),
            "PYBIND11_INCLUDE": pybind11.get_include(),
            "OUTPUT_DIR": output.parent,
            "MODULE_NAME": output.name,
            "EMULATOR": os.environ.get("REBASED_EMULATOR", "0"),
            "REBASED_LINEINFO": os.environ.get("REBASED_LINEINFO", "0"),
            "REBASED_WERROR": os.environ.get("REBASED_WERROR", "0"),
            "NVCC": nvcc,
            "CMAKE_CUDA_ARCHITECTURES": architectures() if nvcc else "",
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        configure = [tools["cmake"], "-S", str(HERE), "-B", str(build), "-G", "Ninja"]
        subprocess.check_call([*configure, *definitions])
        subprocess.check_call([tools["cmake"], "--build", str(build), "-j", str(jobs())])
        say(f"built {output.name} " + (f"with CUDA kernels by {nvcc}" if nvcc else "for the CPU only"))


setup(
    license="Apache-2.0",
    ext_modules=[Extension(LIBRARY, []), Extension(MODULE, [])],
    cmdclass={"build_ext": CMakeBuild},
)
