"""The rules of the house: who may import whom, and how large a room may be."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "distill"
FILES = sorted(PACKAGE.rglob("*.py"))

# room -> rooms that it may import (besides itself). What is not listed is forbidden.
BASE = {"files", "typed", "names", "terminal", "world", "interrupt"}
BELOW = {
    "files": set(),
    "typed": set(),
    "names": set(),
    "terminal": {"typed"},
    "world": set(),
    "interrupt": set(),
    "launch": set(),
    "process": set(),
    "data": {"files"},
    "nets": {"data", "process", "typed"},
    "samplers": {"process"},
    "assets": set(),
    "models": {"process", "nets", "data", "samplers", "files", "typed", "names", "assets"},
    "cache": {"models", "process", "data", "samplers", *BASE},
    "evaluation": {"models", "process", "data", "samplers", *BASE},
    "exporters": {"models", "evaluation", "process", "nets", "data", "samplers", *BASE},
    "engine": {"models", "process", "data", "samplers", *BASE},
    "methods": {"engine", "models", "nets", "process", "data", "samplers", "typed"},
    "stages": {
        *(
            "methods",
            "engine",
            "exporters",
            "evaluation",
            "cache",
            "models",
            "process",
            "data",
            "samplers",
            "nets",
            "assets",
        ),
        *BASE,
    },
    "recipe": {"stages", "engine", *BASE},
    "cluster": {"recipe", "stages", *BASE},
}
VERBS = {"train", "submit", "sample", "evaluate", "compare", "export", "demo", "doctor"}
FOREIGN = {
    "hydra": {"cluster", "recipe", "stages", "train", "evaluate"},
    "omegaconf": {"cluster", "recipe", "stages", "train", "evaluate"},
    "lightning": {"engine"},
    "matplotlib": {"evaluation", "__init__"},
    "torchmetrics": {"evaluation"},
    "wandb": {"engine"},
}


def room(path: Path) -> str:
    """The part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, line) of every import, wherever it stands in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found.append((node.module, node.lineno))
    return found


def test_dependencies_point_down():
    seen = set()
    for path in FILES:
        here = room(path)
        seen.add(here)
        for module, line in imports(path):
            parts = module.split(".")
            if parts[0] == "distill" and len(parts) > 1 and here in BELOW and parts[1] != here:
                assert parts[1] in BELOW[here], f"{path}:{line}: {here} must not import {module}"
            if parts[0] in FOREIGN:
                assert here in FOREIGN[parts[0]], f"{path}:{line}: {here} must not import {module}"
    assert seen == {*BELOW, *VERBS, "__init__"}, "a new room needs its place in this table"


def test_no_module_imports_libraries_of_large_models_when_it_is_imported():
    """They take seconds, which recipes without such models must not pay: functions import them, or `import_module` does."""
    large = {"diffusers", "transformers", "peft", "webdataset", "wandb"}
    inner = 0
    for path in FILES:
        tree = ast.parse(path.read_text())
        functions = [
            node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        typing = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        lines = {line for n in (*functions, *typing) for line in range(n.lineno, (n.end_lineno or 0) + 1)}
        for module, line in imports(path):
            if module.partition(".")[0] in large:
                inner += 1
                assert line in lines, f"{path}:{line}: import {module} in the function that needs it"
    assert inner >= 3, "else this test sees nothing"


def test_methods_do_not_import_each_other():
    methods = [path for path in FILES if path.parent.name == "methods" and path.name != "__init__.py"]
    assert len(methods) >= 3
    for path in methods:
        for module, line in imports(path):
            shared = ("distill.methods.losses", "distill.methods.families")
            other = module.startswith("distill.methods.") and not module.startswith(shared)
            assert not other, (
                f"{path}:{line}: what methods share belongs to methods/families or methods/losses"
            )


def code_lines(path: Path) -> int:
    """Lines of code: no blank lines, comments or docstrings."""
    source = path.read_text()
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
        ):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def test_sizes():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path}:{node.lineno}: {node.name} has {length} lines"
        if room(path) in VERBS:
            assert code_lines(path) <= 60, path
        if path.parent.name == "methods":
            assert code_lines(path) <= 200, path


def test_no_unsafe_loading_anywhere():
    for path in [*FILES, *sorted((ROOT / "scripts").rglob("*.py"))]:
        text = path.read_text()
        for forbidden in ("weights_only=False", "trust_remote_code=True", "pickle.load", "nan_to_num"):
            assert forbidden not in text, f"{path}: {forbidden}"


def test_what_evaluating_imports():
    """`distill.evaluate --help` needs no torch, and measuring no Lightning: both would take most of its time."""
    code = (
        "import sys, distill.evaluate; assert 'torch' not in sys.modules;"
        "import distill.stages.standalone, distill.evaluation.meters.points;"
        "found = {'lightning', 'wandb', 'torchmetrics', 'matplotlib', 'distill.engine.module'} & set(sys.modules);"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
