"""Imports go one way: by layers, and without a circle between modules."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

import pytest
from project import ROOT

pytestmark = pytest.mark.cpu
PACKAGE = "cpo_kernels"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}
# What each part may import of the package, besides itself.
LEAVES = {"loss_table", "kernels", "options", "objective", "layout"}
ALLOWED = {
    "loss_table": set(),
    "kernels": {"loss_table"},
    "options": {"loss_table"},
    "layout": {"options"},
    "objective": {"kernels", "loss_table", "options"},
    "engine": LEAVES,
    "functional": LEAVES | {"engine"},
    "modules": LEAVES | {"engine", "functional"},
    "backends": {"kernels"},
}
CORE = {*ALLOWED}
ALLOWED |= {
    "models": CORE,
    "negatives": CORE | {"models"},
    "trainer": CORE | {"models", "negatives"},
    "integrations": CORE | {"models"},
    "cli": CORE | {"models", "negatives", "trainer", "__init__"},
    "__main__": {"cli"},
    "__init__": CORE | {"models", "trainer"},
}


def part_of(module: str) -> str:
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def at_import(node: ast.AST):
    """Imports that run when a module is imported: not those within functions, nor for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        yield from at_import(child)


def imports_of(module: str) -> set[str]:
    """Modules of the package that a module imports when it is imported."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in at_import(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        if source.split(".")[0] == PACKAGE:
            names = [f"{source}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else source for name in names}
    return found - {module}


def test_parts_import_only_what_lies_below_them():
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        for other in sorted(imports_of(module))
        if part_of(other) != part_of(module) and part_of(other) not in ALLOWED[part_of(module)]
    ]
    assert not wrong


def test_modules_import_each_other_without_a_circle():
    graph = {module: {other for other in imports_of(module) if other != PACKAGE} for module in MODULES}
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) >= len(MODULES)
