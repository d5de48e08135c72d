"""The layers of docs/background/architecture.md: who imports whom, what importing costs, and what it leaves alone."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/background/architecture.md"
LIGHT = ("hgkd", "hgkd.mmcv_ops", "hgkd.sparse", "hgkd.weights", "hgkd.students", "hgkd.export")
HEAVY = ("matplotlib", "sklearn", "mmdet", "mmseg", "mmcv", "tensorboard", "torch.utils.tensorboard", "onnx", "pycocotools")
FACADE = "hgkd"  # its functions may import everything, when they are called


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    found = {}
    for file in sorted((ROOT / "hgkd").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if all(part.isidentifier() for part in parts):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def statements(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import below a node, and whether it stands in a function or is there for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, inside
        later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        )
        yield from statements(child, inside or later)


@cache
def imports(module: str) -> frozenset[str]:
    """The package's modules that a module imports, at any depth of its code."""
    found = set()
    for statement, inside in statements(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if module == FACADE and inside:
            continue
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        else:
            assert statement.level == 0, f"{module}:{statement.lineno}: a relative import"
            names = [f"{statement.module}.{alias.name}" for alias in statement.names]
            names = [name if name in modules() else str(statement.module) for name in names]
        found |= {name for name in names if name in modules()}
    return frozenset(found - {module})


@cache
def rows() -> list[tuple[list[str], frozenset[str]]]:
    """The page's table: the layers of each row, and what they may import."""
    section = PAGE.read_text(encoding="utf-8").partition("## Layers")[2].partition("\n## ")[0]
    cells = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`(\w+)`", own), frozenset(re.findall(r"`(\w+)`", known))) for own, _, known in cells]


def allowed(name: str) -> frozenset[str]:
    return next(known for own, known in rows() if name in own)


def layer(module: str) -> str:
    return (module + ".hgkd").split(".")[1]


def test_every_module_lies_in_a_layer_of_the_table() -> None:
    named = [name for own, _ in rows() for name in own]
    assert sorted(named) == sorted({layer(module) for module in modules()})


def test_a_layer_may_import_only_what_stands_above_it() -> None:
    above: set[str] = set()
    for own, known in rows():
        assert known <= above, f"{own} may import {sorted(known - above)}, which does not stand above"
        above |= set(own)


@pytest.mark.parametrize("module", modules())
def test_imports_are_those_that_the_table_allows(module: str) -> None:
    own = layer(module)
    beyond = {layer(name) for name in imports(module)} - {own} - allowed(own)
    assert not beyond, f"docs/background/architecture.md does not let {own} import {sorted(beyond)}"


def test_the_table_allows_nothing_that_nobody_needs() -> None:
    for own, known in rows():
        used = {layer(name) for module in modules() if layer(module) in own for name in imports(module)}
        assert known <= used, f"{own} imports no {sorted(known - used)}"


def test_no_import_goes_in_a_circle() -> None:
    """Whatever is imported runs the packages above it first, so those count, too."""
    graph = {}
    for module in modules():
        found = set(imports(module))
        for name in imports(module):
            parents = [".".join(name.split(".")[:n]) for n in range(2, name.count(".") + 1)]
            found |= {parent for parent in parents if not module.startswith(parent + ".") and parent != module}
        graph[module] = found
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def python(code: str, *arguments: str) -> str:
    """The output of a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("names", [*((name,) for name in LIGHT), LIGHT[::-1]], ids=" ".join)
def test_a_package_works_by_itself_and_is_light(names: tuple[str, ...]) -> None:
    code = (
        "import importlib, json, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    loaded = set(json.loads(python(code, *names).splitlines()[-1]))
    unwanted = {*HEAVY, *(("torch", "numpy", "mmengine") if set(names) <= {"hgkd", "hgkd.mmcv_ops"} else ())}
    assert not unwanted & loaded
    if set(names) <= {"hgkd", "hgkd.mmcv_ops", "hgkd.sparse"}:
        allowed = (
            ("hgkd.sparse", "hgkd.errors", "hgkd.differences", "hgkd.writing")
            if names == ("hgkd.sparse",)
            else ("hgkd.mmcv_ops", "hgkd.errors")
        )
        assert all(name == "hgkd" or name.startswith(allowed) for name in loaded if name.split(".")[0] == "hgkd")


def foreign() -> list[str]:
    """What the package's modules import of others when they are imported themselves."""
    found = set()
    for file in modules().values():
        for statement, inside in statements(ast.parse(file.read_text(encoding="utf-8"))):
            if not inside:
                names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else [statement.module]
                found |= {str(name) for name in names if str(name).split(".")[0] != "hgkd"}
    return sorted(found - {"fcntl", "resource"})


WATCH = """
import importlib, logging, os, random, signal, sys, warnings
foreign, ours = (text.split() for text in sys.argv[1:])
for name in foreign:
    try:
        importlib.import_module(name)
    except ImportError:
        pass  # optional
import matplotlib, numpy, torch
def state():
    return {
        "matplotlib backend": dict.__getitem__(matplotlib.rcParams, "backend"),
        "warnings": list(warnings.filters),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "Python's random": random.getstate(),
        "numpy's random": repr(numpy.random.get_state()),
        "torch's random": torch.get_rng_state().tolist(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "root logger": (logging.root.level, list(logging.root.handlers)),
        "path": list(sys.path),
    }
failed = []
for name in ours:
    child = os.fork()
    if not child:  # a process of its own for each, in which nothing of hgkd was imported before
        try:
            before = state()
            importlib.import_module(name)
            after = state()
            changed = [what for what in before if before[what] != after[what]]
            print(name, "changes", changed, file=sys.stderr) if changed else None
            os._exit(bool(changed))
        except BaseException as error:
            print(name, repr(error), file=sys.stderr)
            os._exit(1)
    failed += [name] * bool(os.waitpid(child, 0)[1])
sys.exit(bool(failed))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_whatever_is_imported_first_works_and_changes_nothing_of_the_process() -> None:
    """Every package, and every module of packages that import nothing themselves."""
    first = [
        name for name, file in modules().items() if file.name == "__init__.py" or not imports(name.rpartition(".")[0] or name)
    ]
    python(WATCH, " ".join(foreign()), " ".join(first))
