"""Imports only point down the floors of DESIGN section 4."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = (
    "errors",
    "arguments",
    "hparams",
    "augment",
    "rules",
    "compiler",
    "transform",
    "verify",
    "data",
    "example_input",
    "model_reference",
    "bilevel",
    "cli",
)
"""Lowest first; a file imports from its own floor and those below."""
PUBLIC = {ROOT / "stn_fx" / "__init__.py"}


def floor_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return "cli" if relative.parts[0] == "cli" else relative.with_suffix("").parts[1]


def imported_floors(path: Path) -> set[str]:
    """Floors that this file needs to run; what only a type checker reads does not count."""
    found = set()
    for node in _statements(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.level:  # within the command line, whose package has another name than its folder
                assert floor_of(path) == "cli", f"{path}: relative imports hide the floor"
                continue
            modules = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "stn_fx" else [node.module]
            )
        for module in modules:
            parts = module.split(".")
            if parts[0] == "stn_fx_cli":
                found.add("cli")
            elif parts[0] == "stn_fx" and len(parts) > 1:
                found.add(parts[1])
    return found


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _statements(child)


def test_imports_point_down() -> None:
    upward = []
    files = [p for folder in ("stn_fx", "cli") for p in (ROOT / folder).rglob("*.py") if p not in PUBLIC]
    assert len(files) > 30
    for path in files:
        own = FLOORS.index(floor_of(path))
        for floor in imported_floors(path) & set(FLOORS):
            if FLOORS.index(floor) > own:
                upward.append(f"{path.relative_to(ROOT)} imports from {floor}")
    assert not upward, upward


def test_every_floor_is_known() -> None:
    floors = {floor_of(p) for folder in ("stn_fx", "cli") for p in (ROOT / folder).rglob("*.py") if p not in PUBLIC}
    assert floors <= set(FLOORS), f"name the floor of {floors - set(FLOORS)} in this test and in DESIGN"
