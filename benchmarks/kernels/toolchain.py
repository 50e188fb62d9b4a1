"""Compiles csrc/cuda/instances/*.cu one at a time and keeps what nvcc and ptxas said.

Compilations are kept in build/kernel_reports, named by a hash of the preprocessed source, the flags and the
compiler's version: what has not changed is not compiled again, and a changed comment changes nothing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build/kernel_reports"
FLAGS = ("-std=c++17", f"-I{ROOT / 'csrc'}")  # of this checkout's sources
JOBS = 2


class ToolMissingError(RuntimeError):
    """A program that this needs is not on the machine; the message says how to get it."""


class CompileError(RuntimeError):
    """nvcc refused a source; the message is what it printed."""


def cuda_program(name: str) -> str:
    """Path of a program of the CUDA toolkit: in $CUDA_HOME/bin, on PATH, or of NVIDIA's PyPI packages."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders = [f"{home}/bin", os.environ.get("PATH", "")]
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        folders += [str(folder) for folder in sorted(Path(root).glob("*/bin"))]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if not found:
        hint = "a CUDA toolkit" if name == "nvcc" else f"`pip install nvidia-cuda-{name}`"
        raise ToolMissingError(f"no {name} in $CUDA_HOME/bin or on PATH: install {hint}")
    return found


@functools.cache
def compiler_version() -> str:
    return run([cuda_program("nvcc"), "--version"]).strip()


def compiler_release() -> str:
    """Like "nvcc 13.0.88", for reports."""
    return "nvcc " + re.search(r"\bV([\d.]+)", compiler_version()).group(1)


def toolkit_include() -> Path:
    """The folder of cuda_runtime.h, as nvcc itself finds it."""
    command = [cuda_program("nvcc"), "--dryrun", "-E", "-x", "cu", os.devnull]
    output = subprocess.run(
        command, text=True, capture_output=True, check=True
    ).stderr  # that is where it goes
    top = re.search(r"^#\$ TOP=(.*)$", output, re.MULTILINE).group(1)
    return Path(top) / "include"


def run(command: list[str], stdin: str | None = None) -> str:
    """The command's standard output; CompileError with everything it printed if it fails."""
    result = subprocess.run(command, input=stdin, text=True, capture_output=True, check=False)
    if result.returncode:
        raise CompileError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


@dataclass(frozen=True)
class Compilation:
    source: Path
    architecture: int  # 90 for sm_90
    folder: Path
    log: str  # of nvcc and ptxas -v
    seconds: float  # that it took, now or when it was put in the cache

    @property
    def cubin(self) -> Path:
        return self.folder / "kernels.cubin"

    @property
    def ptx(self) -> Path:
        return self.folder / f"{self.source.stem}.ptx"


def instances(pattern: str = "*", root: Path = ROOT) -> list[Path]:
    """The kernels' sources of the checkout in `root`."""
    return sorted((root / "csrc/cuda/instances").glob(f"{pattern}.cu"))


def compile_source(source: Path, architecture: int, root: Path = ROOT) -> Compilation:
    """cubin, PTX and log of one source for one architecture, from the cache if nothing has changed.

    `root` is the checkout that the source is of: its own headers are included.
    """
    compiler = [cuda_program("nvcc"), "-std=c++17", f"-I{root / 'csrc'}", f"-arch=sm_{architecture}"]
    flags = ["-Xptxas", "-v", "-lineinfo", "-cubin"]
    key = content_key(compiler, source, flags)
    folder = CACHE / f"{source.stem}.sm_{architecture}.{key}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="compiling.") as scratch:
            outputs = ["-keep", "-keep-dir", scratch, "-o", f"{scratch}/kernels.cubin"]
            command = [*compiler, *flags, *outputs, str(source)]
            begin = time.monotonic()
            result = subprocess.run(command, text=True, capture_output=True, check=False)
            seconds = time.monotonic() - begin
            log = result.stdout + result.stderr
            if result.returncode:
                raise CompileError(f"{source.name} does not compile for sm_{architecture}:\n{log}")
            if key != content_key(compiler, source, flags):
                raise CompileError(f"{source.name} changed while it was being compiled")
            kept = Path(scratch) / "kept"
            kept.mkdir()
            for name in ("kernels.cubin", f"{source.stem}.ptx"):
                (Path(scratch) / name).rename(kept / name)
            (kept / "log.json").write_text(json.dumps({"log": log, "seconds": round(seconds, 2)}))
            try:
                kept.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    return Compilation(source, architecture, folder, **json.loads((folder / "log.json").read_text()))


def host_program(source: Path, compiler: list[str]) -> Path:
    """The program that `compiler` makes of one source, from the cache if nothing has changed."""
    key = content_key(compiler, source, [])
    program = CACHE / f"{source.stem}.{key}"
    if not program.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="compiling.") as scratch:
            run([*compiler, str(source), "-o", f"{scratch}/program"])
            if key != content_key(compiler, source, []):
                raise CompileError(f"{source.name} changed while it was being compiled")
            Path(scratch, "program").rename(program)
    return program


def content_key(compiler: list[str], source: Path, flags: list[str]) -> str:
    """A name for what this compiler makes of the source as it is now, in whichever folder that lies."""
    preprocessed = run([*compiler, "-E", str(source)])
    # line markers hold paths, whose folders do not matter; code is compiled with the numbers of its lines
    lines = re.sub(r'^#\s*(\d+) ".*?([^"/]*)"', r"# \1 \2", preprocessed, flags=re.MULTILINE).splitlines()
    options = [word for word in compiler if not word.startswith("-I")]  # the text has what they led to
    text = "\n".join([compiler_version(), *options, *flags, *lines])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compile_all(
    sources: Iterable[Path],
    architectures: Iterable[int],
    failed: Callable[[CompileError], None],
    root: Path = ROOT,
) -> list[Compilation]:
    """Every source for every architecture, JOBS at a time; `failed` is told of those that do not compile."""

    def attempt(pair: tuple[int, Path]) -> Compilation | CompileError:
        try:
            return compile_source(pair[1], pair[0], root)
        except CompileError as error:
            return error

    pairs = [(architecture, source) for architecture in architectures for source in sources]
    compilations = []
    with ThreadPoolExecutor(JOBS) as pool:
        for result in pool.map(attempt, pairs):
            if isinstance(result, CompileError):
                failed(result)
            else:
                compilations.append(result)
    return compilations
