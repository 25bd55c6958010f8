"""Imports run downward only: scripts -> training, retraining -> experiment -> engine -> families -> utils."""

import ast

import pytest
from conftest import ROOT

SCRIPTS = ("main_stage1", "main_stage2", "evaluate", "compare", "predict", "extract")
FAMILIES = {"datasets", "models", "losses"}
MAY_IMPORT = {
    "utils": {"utils"},
    "losses": {"losses", "utils"},
    "models": {"models", "utils"},
    "datasets": {"datasets", "utils"},
    "engine": FAMILIES | {"utils"},
    "experiment": FAMILIES | {"utils", "engine", "experiment"},
    "training": FAMILIES | {"utils", "engine", "experiment", "training"},
    "retraining": FAMILIES | {"utils", "engine", "experiment", "retraining"},
    **{script: FAMILIES | {"utils", "engine", "experiment"} for script in SCRIPTS},
    "main_stage1": FAMILIES | {"utils", "engine", "experiment", "training"},
    "main_stage2": FAMILIES | {"utils", "engine", "experiment", "retraining"},
    "compare": FAMILIES | {"utils", "engine", "experiment", "retraining"},
    "extract": FAMILIES | {"utils", "engine", "experiment", "retraining"},
}
EVERYTHING = set(MAY_IMPORT) | {"benchmarks", "tests"}


def files_of(layer: str) -> list:
    return [ROOT / f"{layer}.py"] if (ROOT / f"{layer}.py").is_file() else sorted((ROOT / layer).rglob("*.py"))


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_run_downward(layer: str) -> None:
    assert files_of(layer)
    for path in files_of(layer):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                assert all(alias.name != "*" for alias in node.names), f"{path}: import *"
                modules = [node.module or ""]
            used = {module.split(".")[0] for module in modules} & EVERYTHING
            assert used <= MAY_IMPORT[layer], f"{path}:{node.lineno} imports {used - MAY_IMPORT[layer]}"


def test_every_module_has_a_layer() -> None:
    modules = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert modules - {"benchmarks"} == set(MAY_IMPORT)
