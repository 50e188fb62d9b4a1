"""The rules that keep the source tree readable, each held on the tree as it is and on a planted violation.

`csrc/README.md` says which folder of csrc may include which; this file reads its table. A rule is
a function of a root folder that returns its violations as lines of text, so that a test can hand it a small
tree of its own.
"""

import ast
import fnmatch
import io
import os
import re
import shlex
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source folder")

CPP = (".h", ".cuh", ".cpp", ".cu")
MAX_LINES, MAX_COLUMNS = 400, 110
LONG_FILES = {
    "csrc/cuda/device/device.cuh"
}  # every primitive of the hardware, side by side with the emulator's
FAMILIES = ("cuda/general", "cuda/float32", "cuda/tensor_core")
COMPILED = "rebased_cuda._C"  # the only module with no source among the package's files
# The emulator's runtime stands for what nvcc provides, as a compiler's own headers do.
STANDS_FOR_NVCC = ("csrc/cuda/device/device.cuh", "csrc/emulator/runtime.h")


@cache
def _files(root: Path) -> tuple[str, ...]:
    """The tree's files, as paths from `root`, without what builds, tests and experiments leave behind."""
    found = []
    for folder, folders, names in os.walk(root):
        top = Path(folder) == root
        left_out = {"build", "dist"} if top else {"__pycache__", "runs"}
        folders[:] = [
            name
            for name in folders
            if name not in left_out
            and not name.endswith(".egg-info")
            and (not name.startswith(".") or name == ".ci")
        ]
        found += [Path(folder, name).relative_to(root).as_posix() for name in names]
    return tuple(sorted(found))


def _under(root: Path, folder: str, endings: tuple[str, ...]) -> list[str]:
    return [file for file in _files(root) if file.startswith(f"{folder}/") and file.endswith(endings)]


# ---- includes ----


def _folder_table(root: Path) -> dict[str, set[str] | None]:
    """The rows of `csrc/README.md`: a folder, and the folders that it may include, None for its parent's."""
    table: dict[str, set[str] | None] = {}
    for line in (root / "csrc/README.md").read_text().splitlines():
        row = re.fullmatch(r"\| `([\w/]+)/` \|.*\|([^|]*)\|", line)
        if row:
            folders = set(re.findall(r"`([\w/]+)/`", row[2]))
            table[row[1]] = None if row[2].strip().startswith("as ") else folders
    return table


def _listed(folder: str, table: dict[str, set[str] | None]) -> str:
    """The folder whose row says what files of `folder` may include; empty where there is none."""
    while folder and table.get(folder) is None:
        folder = folder.rpartition("/")[0]
    return folder


def _includes(root: Path) -> Iterator[tuple[str, str]]:
    for file in _under(root, "csrc", CPP):
        for name in re.findall(r'^\s*#\s*include "([^"]+)"', (root / file).read_text(), re.MULTILINE):
            beside = f"{file.rpartition('/')[0]}/{name}"
            yield file, beside if (root / beside).is_file() else f"csrc/{name}"


def includes_that_point_up(root: Path) -> list[str]:
    table = _folder_table(root)
    wrong = []
    for file, included in _includes(root):
        if (file, included) == STANDS_FOR_NVCC:
            continue
        here = _listed(file.removeprefix("csrc/").rpartition("/")[0], table)
        there = included.removeprefix("csrc/").rpartition("/")[0]
        allowed = {here, *(table.get(here) or ())}
        if not any(there == folder or there.startswith(f"{folder}/") for folder in allowed if folder):
            wrong.append(f"{file} includes {included}")
    return wrong


def folders_listed_above_what_they_include(root: Path) -> list[str]:
    """A row of the table may name only rows above itself, and no kernel family another one."""
    wrong, above = [], set[str]()
    for folder, allowed in _folder_table(root).items():
        wrong += [
            f"{folder}/ may include {other}/, which has no row above" for other in (allowed or set()) - above
        ]
        if folder in FAMILIES:
            wrong += [
                f"{folder}/ may include the family {other}/"
                for other in (allowed or set()) & {*FAMILIES, "cuda"}
            ]
        above.add(folder)
    return wrong


def folders_without_a_line(root: Path) -> list[str]:
    table = _folder_table(root)
    folders = {
        str(Path(file).parent.relative_to("csrc")) for file in _files(root) if file.startswith("csrc/")
    }
    return sorted(f"csrc/{folder}/ has no line in csrc/README.md" for folder in folders - {"."} - set(table))


def rows_without_a_folder(root: Path) -> list[str]:
    return [
        f"csrc/{name}/ does not exist" for name in _folder_table(root) if not (root / "csrc" / name).is_dir()
    ]


def _circles(graph: dict[str, set[str]]) -> list[str]:
    """Each circle of the graph once, as the path that closes it."""
    found: list[str] = []
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> None:
        if node in path:
            found.append(" -> ".join([*path[path.index(node) :], node]))
        elif node not in done:
            for other in sorted(graph.get(node, ())):
                walk(other, [*path, node])
            done.add(node)

    for node in sorted(graph):
        walk(node, [])
    return found


def include_circles(root: Path) -> list[str]:
    graph: dict[str, set[str]] = {}
    for file, included in _includes(root):
        if (file, included) != STANDS_FOR_NVCC:
            graph.setdefault(file, set()).add(included)
    return _circles(graph)


def long_files(root: Path) -> list[str]:
    counts = {file: (root / file).read_text().count("\n") for file in _under(root, "csrc", CPP)}
    return [
        f"{file} has {count} lines"
        for file, count in counts.items()
        if count > MAX_LINES and file not in LONG_FILES
    ]


def long_lines(root: Path) -> list[str]:
    """clang-format holds code to 110 columns but leaves comments as they are, for their tables' sake."""
    lines = ((file, n, line) for file in _under(root, "csrc", CPP) for n, line in _numbered(root, file))
    return [
        f"{file}:{number} has {len(line)} columns" for file, number, line in lines if len(line) > MAX_COLUMNS
    ]


def _numbered(root: Path, file: str) -> Iterator[tuple[int, str]]:
    return enumerate((root / file).read_text().splitlines(), 1)


def files_that_do_not_say_what_they_are_for(root: Path) -> list[str]:
    """Sources with no comment or docstring at their top; instances name their kernels and nothing else."""
    cpp = [file for file in _under(root, "csrc", CPP) if "/instances/" not in file]
    python = [
        file
        for folder in ("rebased_cuda", "benchmarks", "examples")
        for file in _under(root, folder, (".py",))
    ]
    starts = {**dict.fromkeys(cpp, "//"), **dict.fromkeys(python, '"""')}
    return [
        file
        for file, start in starts.items()
        if not (root / file).read_text().startswith((start, f"r{start}"))
    ]


# ---- Python imports ----


def _imports(root: Path, file: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every import, relative ones made absolute, without those for type checkers alone."""
    tree = ast.parse((root / file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    package = file.rpartition("/")[0].replace("/", ".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from ((module, alias.name) for alias in node.names)


def private_imports(root: Path) -> list[str]:
    """Imports from outside the package of what its own modules keep to themselves."""
    outside = [file for file in _files(root) if file.endswith(".py") and not file.startswith("rebased_cuda/")]
    wrong = []
    for file in outside:
        for module, name in _imports(root, file):
            parts = [*module.split("."), name]
            if parts[0] == "rebased_cuda" and any(re.match(r"_(?!_)", part) for part in parts):
                wrong.append(f"{file} imports {name or module} from {module}")
    return wrong


def import_circles(root: Path) -> list[str]:
    """Circles among the package's modules, of imports inside functions too: these only hide a circle."""
    modules = {}
    for file in _under(root, "rebased_cuda", (".py",)):
        modules[file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")] = file
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        for module, imported in _imports(root, file):
            whole = f"{module}.{imported}"
            target = whole if whole in modules or whole == COMPILED else module
            if target in modules and target != name:
                graph.setdefault(name, set()).add(target)
    return _circles(graph)


# ---- words of pages and comments ----

WORD = re.compile(r"[A-Za-z_]\w*")
FILE_NAME = re.compile(r"[\w./*-]*[\w*]\.(?:cuh|cu|cpp|h|py|cmake|md|sh|jsonl?|toml)\b(?![.(]\w)")
SPAN = re.compile(r"``?([^`\n]+)``?")
IDENTIFIER = re.compile(r"[A-Za-z_][\w.:]*(?:\(\))?")
MODULE = re.compile(r"python3? -m ((?:benchmarks|rebased_cuda)[\w.]*)")
UNDERSCORED = re.compile(
    r"\b[a-z]\w*_[a-z0-9]{3,}\b"
)  # shorter ends are a formula's indices, as in v_j and c_ij
PLACEHOLDER = re.compile(r"(?:.*/)?[A-Z]+\.jsonl?")  # FILE.json: a name of the reader's choice


def _split_cpp(text: str) -> tuple[str, list[tuple[int, str]]]:
    """The code, and the comments with their line numbers."""
    code, comments = [], []
    for number, line in enumerate(text.splitlines(), 1):
        before, slashes, comment = re.sub(
            r'"(?:\\.|[^"\\])*"', lambda x: x[0].replace("//", "  "), line
        ).partition("//")
        code.append(before)
        if slashes:
            comments.append((number, comment))
    return "\n".join(code), comments


def _split_python(text: str) -> tuple[str, list[tuple[int, str]]]:
    code, comments = [], []
    starts = {
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.NL,
        tokenize.COMMENT,
    }
    before = tokenize.ENCODING
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        is_docstring = token.type == tokenize.STRING and before in starts and depth == 0
        if token.type == tokenize.COMMENT or is_docstring:
            comments += [(token.start[0] + i, line) for i, line in enumerate(token.string.splitlines())]
        else:
            code.append(token.string)
        before = token.type
    return " ".join(code), comments


def _split(root: Path, file: str) -> tuple[str, list[tuple[int, str]]]:
    text = (root / file).read_text()
    if file.endswith(CPP):
        return _split_cpp(text)
    if file.endswith(".py"):
        return _split_python(text)
    if file.endswith(".md"):  # an example's names are code
        pieces = re.split(r"^```.*$", text, flags=re.MULTILINE)
        number, prose = 1, []
        for i, piece in enumerate(pieces):
            if i % 2 == 0:
                prose += [(number + j, line) for j, line in enumerate(piece.split("\n"))]
            number += piece.count("\n")
        return "\n".join(pieces[1::2]), prose
    return text, []  # CMake, shell, settings


@cache
def _prose_and_code(root: Path) -> tuple[dict[str, list[tuple[int, str]]], frozenset[str], str]:
    """Pages and comments by file; every word of the code; the code itself."""
    endings = (
        *CPP,
        ".py",
        ".md",
        ".txt",
        ".cmake",
        ".sh",
        ".toml",
        ".yaml",
        ".cff",
        ".ci/run",
        ".clang-format",
    )
    prose, code = {}, []
    for file in _files(root):
        if (
            file.endswith(endings)
            and not file.startswith("benchmarks/results/")
            and file != "python_tests/tools/test_house.py"
        ):
            one, comments = _split(root, file)
            code.append(one)
            prose[file] = comments
    whole = "\n".join(code)
    return prose, frozenset(WORD.findall(whole)), whole


def _symbols(root: Path) -> set[str]:
    """The letters of formulas: the first column of the table of symbols in `csrc/README.md`."""
    page = root / "csrc/README.md"
    _, _, section = (page.read_text() if page.is_file() else "").partition("## Symbols\n")
    rows = re.findall(r"^\| (`.*?) \|", section.partition("\n## ")[0], re.MULTILINE)
    return {word for row in rows for word in WORD.findall(row)}


def names_that_do_not_exist(root: Path) -> list[str]:
    """Identifiers in backticks, files, modules to run, and in csrc each word_with_an_underscore."""
    prose, words, code = _prose_and_code(root)
    files = _files(root)
    known = words | _symbols(root) | {Path(part).stem for file in files for part in Path(file).parts}

    def file_exists(name: str) -> bool:
        name = name.removeprefix("./")
        return (
            bool(PLACEHOLDER.fullmatch(name))
            or name in code
            or any(fnmatch.fnmatch(f"/{file}", f"*/{name}") for file in files)
        )

    wrong = []
    for file, lines in prose.items():
        for number, line in lines:
            unknown = {name for name in FILE_NAME.findall(line) if not file_exists(name)}
            rest = FILE_NAME.sub(" ", line)
            spans = [span for span in SPAN.findall(rest) if IDENTIFIER.fullmatch(span)]
            if file.startswith("csrc/"):
                spans += [word for word in UNDERSCORED.findall(rest) if not re.fullmatch(r"sm_\d+", word)]
            unknown |= {word for span in spans for word in WORD.findall(span) if word not in known}
            for module in MODULE.findall(line):
                path = module.rstrip(".").replace(".", "/")
                if not {f"{path}.py", f"{path}/__main__.py"} & set(files):
                    unknown.add(module)
            wrong += [f"{file}:{number}: {name}" for name in sorted(unknown)]
    return wrong


# How a change came about is for its commit message at most: the tree speaks of the op, and of no machine.
WORKPLACE = re.compile(
    r"\b(?:this|last|next|previous|another|earlier) sessions?\b|\bissues? #?\d+|\bworktrees?\b"
    r"|\bin this (?:commit|pull request)\b|(?<![\w.])/(?:work|root|home)/\w",
    re.IGNORECASE,
)


def words_about_the_workplace(root: Path) -> list[str]:
    wrong = []
    for file, lines in _prose_and_code(root)[0].items():
        wrong += [
            f"{file}:{number}: {found[0]}" for number, line in lines for found in WORKPLACE.finditer(line)
        ]
    return wrong


# ---- tables in comments ----


def torn_comments(root: Path) -> list[str]:
    """Comment lines of at most three words that end no sentence, each between a long line and another one.

    Such a line is left where a formatter broke a line that was too long; in a table it ruins the columns too.
    """
    wrong = []
    for file in _under(root, "csrc", CPP):
        lines = (root / file).read_text().splitlines()
        for number in range(1, len(lines) - 1):
            before, here, after = (re.fullmatch(r"\s*//( *)(.*)", lines[number + i]) for i in (-1, 0, 1))
            if not (before and here and after) or here[2].endswith((".", ":", ";", "?")) or not here[2]:
                continue
            if (
                len(here[2].split()) <= 3
                and len(lines[number - 1]) > 80
                and len(before[1]) >= len(here[1])
                and after[2]
            ):
                wrong.append(f"{file}:{number + 1}: {here[2]}")
    return wrong


# ---- one list of checks ----


def stages_of_one_place_only(root: Path) -> list[str]:
    """.ci/run's stages and CONTRIBUTING's table of them."""
    stages = re.search(r"^stages=\((.*)\)$", (root / ".ci/run").read_text(), re.MULTILINE)
    assert stages
    _, _, section = (root / "CONTRIBUTING.md").read_text().partition("| stage | what it runs |\n")
    rows = re.findall(r"^\| `(\w+)` \|", section.partition("\n\n")[0], re.MULTILINE)
    return sorted(f"only one of the two has: {name}" for name in {*stages[1].split()} ^ {*rows})


def lint_commands_that_differ(root: Path) -> list[str]:
    """.ci/run's stage `lint` and .pre-commit-config.yaml must run the same commands."""
    stage = re.search(r"^lint\(\) \{.*\n((?:.*\n)*?)\}", (root / ".ci/run").read_text(), re.MULTILINE)
    assert stage
    ours = {line.strip().replace(".venv/bin/", "") for line in stage[1].splitlines()}
    hooks = re.findall(r"^ +entry: (.*)$", (root / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    theirs = {shlex.split(hook)[-1] if hook.startswith("bash -c") else hook for hook in hooks}
    return sorted(f"only one of the two has: {command}" for command in ours ^ theirs)


RULES = [
    includes_that_point_up,
    folders_listed_above_what_they_include,
    folders_without_a_line,
    rows_without_a_folder,
    include_circles,
    long_files,
    long_lines,
    files_that_do_not_say_what_they_are_for,
    private_imports,
    import_circles,
    names_that_do_not_exist,
    words_about_the_workplace,
    torn_comments,
    stages_of_one_place_only,
    lint_commands_that_differ,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps(rule):
    assert rule(ROOT) == []


def _plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


TABLE = """
| folder | what it is | may include |
|---|---|---|
| `op/` | what the op is | |
| `cpu/` | one backend | `op/` |
| `cpu/simd/` | its vectors | as `cpu/` |
| `cuda/general/` | one family | `op/` |
| `cuda/float32/` | another family | `op/` |
"""
LINT = """lint() {
  .venv/bin/ruff check .
  git ls-files '*.h' | xargs .venv/bin/clang-format
}
"""
HOOKS = """repos:
      - id: ruff
        entry: ruff check .
      - id: clang-format
        entry: bash -c "git ls-files '*.h' | xargs clang-format"
"""

# A rule, a tree that breaks it, and what the rule says; then the same tree without the fault.
PLANTED = [
    (
        includes_that_point_up,
        {"csrc/README.md": TABLE, "csrc/op/problem.h": '#include "cpu/call.h"\n', "csrc/cpu/call.h": ""},
        "csrc/op/problem.h includes csrc/cpu/call.h",
        {"csrc/op/problem.h": "", "csrc/cpu/call.h": '#include "op/problem.h"\n'},
    ),
    (
        includes_that_point_up,
        {"csrc/README.md": TABLE, "csrc/cuda/float32/tiles.cuh": '#include "cuda/general/tiles.cuh"\n'},
        "csrc/cuda/float32/tiles.cuh includes csrc/cuda/general/tiles.cuh",
        {"csrc/cuda/float32/tiles.cuh": '#include "cuda/float32/other.cuh"\n#include "op/problem.h"\n'},
    ),
    (
        includes_that_point_up,
        {"csrc/README.md": TABLE, "csrc/cpu/simd/simd.h": '#include "cuda/general/tiles.cuh"\n'},
        "csrc/cpu/simd/simd.h includes csrc/cuda/general/tiles.cuh",
        {"csrc/cpu/simd/simd.h": '#include "cpu/call.h"\n#include "op/problem.h"\n'},
    ),
    (
        folders_listed_above_what_they_include,
        {"csrc/README.md": TABLE.replace("what the op is | |", "what the op is | `cpu/` |")},
        "op/ may include cpu/, which has no row above",
        {"csrc/README.md": TABLE},
    ),
    (
        folders_listed_above_what_they_include,
        {"csrc/README.md": TABLE.replace("another family | `op/` |", "another family | `cuda/general/` |")},
        "cuda/float32/ may include the family cuda/general/",
        {"csrc/README.md": TABLE},
    ),
    (
        folders_without_a_line,
        {"csrc/README.md": TABLE, "csrc/op/problem.h": "", "csrc/cuda/attic/old.cuh": ""},
        "csrc/cuda/attic/ has no line in csrc/README.md",
        {"csrc/README.md": TABLE + "| `cuda/attic/` | old | `op/` |\n"},
    ),
    (
        rows_without_a_folder,
        {"csrc/README.md": "| `op/` | what the op is | |\n| `attic/` | old | |\n", "csrc/op/problem.h": ""},
        "csrc/attic/ does not exist",
        {"csrc/attic/old.h": ""},
    ),
    (
        include_circles,
        {f"csrc/op/{one}.h": f'#include "op/{other}.h"\n' for one, other in ("ab", "bc", "ca")},
        "csrc/op/a.h -> csrc/op/b.h -> csrc/op/c.h -> csrc/op/a.h",
        {"csrc/op/c.h": ""},
    ),
    (
        long_files,
        {"csrc/op/problem.h": "\n" * 401},
        "csrc/op/problem.h has 401 lines",
        {"csrc/op/problem.h": "\n" * 400},
    ),
    (
        long_lines,
        {"csrc/op/problem.h": f"int a;\n//{'-' * 109}\n"},
        "csrc/op/problem.h:2 has 111 columns",
        {"csrc/op/problem.h": f"int a;\n//{'-' * 108}\n"},
    ),
    (
        files_that_do_not_say_what_they_are_for,
        {
            "csrc/op/problem.h": "#pragma once\n",
            "csrc/cuda/instances/step.cu": "",
            "benchmarks/a.py": '"""A."""',
        },
        "csrc/op/problem.h",
        {"csrc/op/problem.h": "// What one call is.\n"},
    ),
    (
        private_imports,
        {"benchmarks/speed.py": "from rebased_cuda import _measure, __version__\n"},
        "benchmarks/speed.py imports _measure from rebased_cuda",
        {"benchmarks/speed.py": "from rebased_cuda import __version__, reference\n"},
    ),
    (
        private_imports,
        {"python_tests/test_op.py": "def test():\n    import rebased_cuda._load\n"},
        "python_tests/test_op.py imports rebased_cuda._load from rebased_cuda._load",
        {"python_tests/test_op.py": "import rebased_cuda.reference\n"},
    ),
    (
        import_circles,
        {
            "rebased_cuda/__init__.py": "from .layers import Layer\n",
            "rebased_cuda/layers.py": "def forward():\n    from .shards import Exchange\n",
            "rebased_cuda/shards.py": "from .layers import Layer\n",
        },
        "rebased_cuda.layers -> rebased_cuda.shards -> rebased_cuda.layers",
        {"rebased_cuda/shards.py": "from . import _C\n"},
    ),
    (
        import_circles,
        {
            "rebased_cuda/__init__.py": "from .layers import Layer\n",
            "rebased_cuda/layers.py": "from . import build_info\n",
        },
        "rebased_cuda -> rebased_cuda.layers -> rebased_cuda",
        {"rebased_cuda/layers.py": "if TYPE_CHECKING:\n    from . import build_info\n"},
    ),
    (
        names_that_do_not_exist,
        {"README.md": "Call `rebase` with `q`.\n", "rebased_cuda/a.py": "def rebased(q): pass\n"},
        "README.md:1: rebase",
        {"README.md": "Call `rebased` with `q`.\n"},
    ),
    (
        names_that_do_not_exist,
        {"csrc/op/a.h": "// See old_name.h.\nint a;\n"},
        "csrc/op/a.h:1: old_name.h",
        {"csrc/op/a.h": "// See op/a.h and a.h.\nint a;\n"},
    ),
    (
        names_that_do_not_exist,
        {"csrc/op/a.h": "int publish_state();  // as publish_gram does with x_i\n"},
        "csrc/op/a.h:1: publish_gram",
        {"csrc/op/a.h": "int publish_state();  // publish_state alone\n"},
    ),
    (
        names_that_do_not_exist,
        {"rebased_cuda/a.py": 'def f(x):\n    """Returns `y`."""\n    return x\n'},
        "rebased_cuda/a.py:2: y",
        {"rebased_cuda/a.py": 'def f(x):\n    """Returns `x`."""\n    return x\n'},
    ),
    (
        names_that_do_not_exist,
        {"README.md": "Run `python -m benchmarks.sped`.\n", "benchmarks/speed/__main__.py": ""},
        "README.md:1: benchmarks.sped",
        {"README.md": "Run `python -m benchmarks.speed`.\n"},
    ),
    (
        words_about_the_workplace,
        {"csrc/op/a.h": "int a;  // see issue #12\n"},
        "csrc/op/a.h:1: issue #12",
        {"csrc/op/a.h": "int a;  // at issue\n"},
    ),
    (
        words_about_the_workplace,
        {"README.md": "Built in /home/me.\n"},
        "README.md:1: /home/m",
        {"README.md": "Built in build/home.\n"},
    ),
    (
        torn_comments,
        {"csrc/op/a.h": f"// {'word ' * 20}\n// only\n// {'word ' * 10}\n"},
        "csrc/op/a.h:2: only",
        {"csrc/op/a.h": f"// {'word ' * 20}\n// only.\n// {'word ' * 10}\n"},
    ),
    (
        stages_of_one_place_only,
        {
            ".ci/run": "stages=(lint sweeps)\n",
            "CONTRIBUTING.md": "| stage | what it runs |\n|---|---|\n| `lint` | |\n",
        },
        "only one of the two has: sweeps",
        {".ci/run": "stages=(lint)\n"},
    ),
    (
        names_that_do_not_exist,
        {"csrc/README.md": "## Symbols\n| `ghat` | r g |\n\n## Then\n| `chat` | no symbol |\n"},
        "csrc/README.md:5: chat",
        {"csrc/README.md": "## Symbols\n| `ghat` | r g |\n\n## Then\n`ghat`\n"},
    ),
    (
        lint_commands_that_differ,
        {".ci/run": LINT, ".pre-commit-config.yaml": HOOKS.replace("check .", "check csrc")},
        "only one of the two has: ruff check .",
        {".pre-commit-config.yaml": HOOKS},
    ),
]


@pytest.mark.parametrize(
    "planted", PLANTED, ids=[f"{case[0].__name__}-{i}" for i, case in enumerate(PLANTED)]
)
def test_a_planted_violation_is_found(planted, tmp_path):
    rule, faulty, said, mended = planted
    assert said in rule(_plant(tmp_path / "faulty", faulty))
    assert rule(_plant(tmp_path / "mended", {**faulty, **mended})) == []


def test_every_rule_has_a_planted_violation():
    assert {case[0] for case in PLANTED} == set(RULES)
