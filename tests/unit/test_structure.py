"""Who may import whom (docs/architecture.md, Rules), read from the source: nothing is imported here."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("recsys_ray", "pipelines", "serve")
# What a replica must not load: code that trains, measures or encodes, and what only that code needs.
NOT_FOR_SERVING = (
    *("baselines", "checks", "demo", "evaluation", "graph.dgl", "hgnn", "report", "studies", "text", "tuning"),
    *("cluster.train", "two_tower.stage", "two_tower.training"),
)


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the project by its dotted name."""
    found = {}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def statements(tree: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    """All statements; without ``lazy``, those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if lazy or not (is_function or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))):
            yield node
            yield from statements(node, lazy)


@cache
def imports(lazy: bool = True) -> dict[str, set[str]]:
    """What each module imports: modules of the project by their full names, others as written."""
    found: dict[str, set[str]] = {}
    for name, tree in sources().items():
        found[name] = set()
        for node in statements(tree, lazy):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name} has a relative import"
                wholes = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= {whole if whole in sources() else str(node.module) for whole in wholes.values()}
    return found


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Groups of two or more that all reach one another."""
    reach = {start: reachable(graph, graph[start]) for start in graph}
    groups = {frozenset(other for other in reach[start] if start in reach.get(other, ())) for start in graph}
    return sorted((set(group) for group in groups if len(group) > 1), key=sorted)


def reachable(graph: Mapping[str, set[str]], starts: set[str]) -> set[str]:
    found, waiting = set[str](), set(starts)
    while waiting:
        found |= waiting
        waiting = {other for one in waiting for other in graph.get(one, ())} - found
    return found


def folder_of(module: str) -> str:
    """The folder or top-level module of recsys_ray; the module itself elsewhere."""
    return module.split(".")[1] if module.startswith("recsys_ray.") else module


def is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set(), "e": {"d", "elsewhere"}}) == [{"a", "b", "c"}]


def test_no_module_imports_itself_on_a_detour() -> None:
    assert circles(imports()) == []


def test_no_folder_imports_itself_on_a_detour() -> None:
    folders: dict[str, set[str]] = {}
    for name, others in imports().items():
        own = folders.setdefault(folder_of(name), set())
        own |= {folder_of(other) for other in others if is_in(other, ("recsys_ray",))} - {folder_of(name)}
    assert circles(folders) == []


@pytest.mark.parametrize("package", ["pipelines", "serve"])
def test_the_library_does_not_import_what_is_built_on_it(package: str) -> None:
    library = {name: others for name, others in imports().items() if is_in(name, ("recsys_ray",))}
    assert {name for name, others in library.items() if any(is_in(other, (package,)) for other in others)} == set()


def test_dgl_is_imported_in_one_folder() -> None:
    users = {name for name, others in imports().items() if any(is_in(other, ("dgl",)) for other in others)}
    assert users, "nothing imports dgl: this test looks at the wrong place"
    assert {name for name in users if not is_in(name, ("recsys_ray.graph.dgl",))} == set()


def test_serving_loads_no_training_code() -> None:
    serving = {name for name in sources() if is_in(name, ("serve", "recsys_ray.serving"))}
    loaded = reachable(imports(lazy=False), serving)
    assert "recsys_ray.serving.recommender" in loaded
    forbidden = (*(f"recsys_ray.{name}" for name in NOT_FOR_SERVING), "pipelines", "dgl", "transformers")
    assert {name for name in loaded if is_in(name, forbidden)} == set()
