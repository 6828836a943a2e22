"""The dependency rule between the packages, checked on the import statements of every file."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# A file imports only from its own room and from rooms of lower floors. Rooms on one floor do not know each other.
FLOORS = [
    {"utils"},
    {"data"},
    {"models"},
    {"evaluation"},
    {"training", "judging", "harness", "doctor", "gguf"},
    {"pairs", "alpacaeval", "human", "chat"},
    {"rewards"},
    {"reporting"},
    {"release"},
    {"scripts", "benchmarks"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def room_of(module: str) -> str | None:
    """The room of a dotted module name; None for a library."""
    parts = module.split(".")
    if parts[0] in SCRIPTS:
        return "scripts"
    return {"preflab": parts[1] if len(parts) > 1 else None, "utils": "utils", "benchmarks": "benchmarks"}.get(parts[0])


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from preflab.models import loading` names the module in its second half.
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def files() -> dict[Path, str]:
    """Every file of the project but its tests, with its room."""
    paths = [*ROOT.glob("*.py"), *(p for d in ("utils", "preflab", "benchmarks") for p in (ROOT / d).rglob("*.py"))]
    modules = {
        path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if path.name != "__init__.py"
    }
    return {path: room_of(module) for path, module in modules.items()}


def broken_rules(path: Path, room: str) -> list[str]:
    rooms = {module: room_of(module) for module in imported_modules(path)}
    below = {name for name, floor in FLOOR_OF.items() if floor < FLOOR_OF[room]}
    allowed = below | ({room} - {"scripts"})
    return [
        f"{path.relative_to(ROOT)} imports {module}" for module, other in rooms.items() if other not in {None, *allowed}
    ]


def test_every_room_has_a_floor():
    rooms = {path.name for path in (ROOT / "preflab").iterdir() if (path / "__init__.py").exists()}
    assert rooms | {"utils", "scripts", "benchmarks"} == set(FLOOR_OF)


def test_imports_point_downwards():
    assert [line for path, room in files().items() if room for line in broken_rules(path, room)] == []


def test_package_init_files_are_empty():
    assert [p for p in (ROOT / "preflab").rglob("__init__.py") if p.read_text().strip()] == []


def module_graph() -> dict[str, set[str]]:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files()}
    return {name: imported_modules(path) & set(names) for name, path in names.items()}


def test_no_circular_imports():
    graph, state = module_graph(), {}

    def visit(name, trail):
        assert state.get(name) != "open", f"circular import: {' -> '.join([*trail, name])}"
        if name not in state:
            state[name] = "open"
            for other in graph[name]:
                visit(other, [*trail, name])
            state[name] = "done"

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize(
    "module",
    # Of the last one: `report.py --status` only reads files.
    ["utils.cli", "preflab.evaluation.arguments", "preflab.harness.arguments", "preflab.reporting.summary"],
)
def test_argument_modules_are_light(module):
    """`--help` must be instant, so what it needs imports neither torch nor transformers."""
    import subprocess
    import sys

    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers', 'trl'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
