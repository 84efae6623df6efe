"""Arrows point down: what each room of the house may import, read from the syntax trees."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "jtl"

GROUND = {"near", "trees", "masks", "per_example"}
FORMULAS = {"losses", "merging", "penalties"}
MAY_IMPORT = {
    "near": set(),
    "trees": {"near"},
    "masks": {"near", "trees"},
    "products": set(),
    "per_example": {"near", "trees", "masks", "products"},
    "losses": GROUND,
    "merging": GROUND,
    "penalties": GROUND,
    "weights": GROUND,
    "data": GROUND,
    "train": GROUND,
    "models": GROUND | {"weights", "data"},
    "report": GROUND | {"jtl"},
    "diagnose": GROUND,
    "recipes": GROUND | FORMULAS | {"weights", "data", "train", "models", "diagnose", "report"},
    "show": GROUND | {"weights", "data", "models", "report"},
    "config": {"near", "recipes"},
    "__main__": {"config"},
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: pathlib.Path) -> set[str]:
    """Return the rooms of jtl that a file imports, inside functions too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        rooms |= {(n.split(".") + ["jtl"])[1] for n in names if n.split(".")[0] == "jtl"}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_down(path):
    allowed = MAY_IMPORT[room(path)] | {room(path)}
    assert imported(path) <= allowed, f"{path.name} may import {sorted(allowed)}"


@pytest.mark.parametrize("folder", sorted(FORMULAS))
def test_formulas_do_not_import_each_other(folder):
    siblings = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    for path in (ROOT / folder).glob("*.py"):
        if path.stem == "__init__":
            continue
        text = ast.parse(path.read_text(encoding="utf-8"))
        modules = {
            node.module.rsplit(".", 1)[-1]
            for node in ast.walk(text)
            if isinstance(node, ast.ImportFrom) and node.module and f"jtl.{folder}" in node.module
        }
        assert not modules & (siblings - {path.stem}), path.name


def test_pytorch_and_tensorflow_are_never_imported():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & {"torch", "tensorflow"}, path.name
