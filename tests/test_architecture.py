"""The house rules that nobody can see in a diff: who may import whom, what stays free of torch, how long things get.

Read from the source by `ast`; nothing is imported. "At module level" is what an import of the module executes, not
what its functions import when they are called.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "loramux_adapters": ROOT / "adapters" / "loramux_adapters",
    "loramux_server": ROOT / "server" / "loramux_server",
}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
HEAVY = ("torch", "transformers", "bitsandbytes", "peft")

TORCH_FREE = [
    "loramux_server.cli",  # --help is immediate
    "loramux_server.config",
    "loramux_server.base.location",
    "loramux_server.cli_keys",
    "loramux_server.keys.guard",
    *(
        f"loramux_server.engine.{name}"
        for name in (
            "messages",
            "options",
            "sequence",
            "kv_cache",
            "prefix_cache",
            "drafts",
            "waiting",
            "scheduler",
            "interface",
            "client",
            "pending",
            "link",
            "budget",
            "reading",
        )
    ),
    *(
        f"loramux_adapters.{name}"
        for name in (
            "errors",
            "access",
            "spec",
            "residency",
            "registry",
            "store",
            "scanner",
            "sources",
            "training.inputs",
            "training.memory",
            "training.outlook",
        )
    ),
]


@dataclass
class Module:
    name: str
    path: Path
    tree: ast.Module
    at_import: set[str] = field(default_factory=set)  # dotted names imported at module level
    anywhere: set[str] = field(default_factory=set)


def statements_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when the module is imported: into classes, `if` and `try`, not into functions or TYPE_CHECKING."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.dump(node.test):
                yield from statements_at_import(node.body)
            yield from statements_at_import(node.orelse)
        elif isinstance(node, ast.Try):
            for part in (node.body, node.orelse, node.finalbody, *(h.body for h in node.handlers)):
                yield from statements_at_import(part)
        elif isinstance(node, ast.With | ast.ClassDef | ast.For | ast.While):
            yield from statements_at_import(node.body)


def imported_names(nodes: Iterator[ast.AST], known: set[str]) -> set[str]:
    """Dotted names; `from package import module` is the module, `from module import thing` is the module too."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this house"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return found


@cache
def modules() -> dict[str, Module]:
    found: dict[str, Module] = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = Module(name, path, ast.parse(path.read_text(), str(path)))
    for module in found.values():
        module.at_import = imported_names(statements_at_import(module.tree.body), set(found))
        module.anywhere = imported_names(ast.walk(module.tree), set(found))
    return found


def parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def own_imports(module: Module) -> set[str]:
    """Modules of ours that importing `module` executes, packages on the way included, its own ones excepted."""
    wanted = module.at_import | {above for name in module.at_import for above in parents(name)}
    return (wanted & set(modules())) - {module.name, *parents(module.name)}


def reach(name: str) -> dict[str, str]:
    """Every module of ours that importing `name` executes -> who asked for it."""
    seen = {name: ""}
    todo = [name]
    while todo:
        current = todo.pop()
        for imported in own_imports(modules()[current]) - seen.keys():
            seen[imported] = current
            todo.append(imported)
    return seen


def imports_of(names: set[str], package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in names)


def test_the_packages_are_found() -> None:
    assert set(TORCH_FREE) <= set(modules())
    assert len(modules()) > 50
    assert "loramux_server.engine.scheduler" in own_imports(modules()["loramux_server.engine.engine"])
    assert "loramux_adapters.layers" in own_imports(modules()["loramux_server.engine.engine"])


def test_no_import_cycles() -> None:
    graph = {name: own_imports(module) for name, module in modules().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("forbidden", ["loramux_server", "fastapi", "starlette", "uvicorn", "zmq"])
def test_adapters_know_no_request(forbidden: str) -> None:
    guilty = [
        module.name
        for module in modules().values()
        if module.name.startswith("loramux_adapters") and imports_of(module.anywhere, forbidden)
    ]
    assert guilty == [], f"{guilty} import {forbidden}"


@pytest.mark.parametrize("name", TORCH_FREE)
def test_policy_needs_no_torch(name: str) -> None:
    asked_by = reach(name)
    for module in asked_by:
        heavy = sorted(package for package in HEAVY if imports_of(modules()[module].at_import, package))
        chain = [module]
        while asked_by[chain[-1]]:
            chain.append(asked_by[chain[-1]])
        assert not heavy, f"{' -> '.join(reversed(chain))} imports {heavy}"


def test_http_needs_no_torch() -> None:
    guilty = [
        module.name
        for module in modules().values()
        if module.name.startswith("loramux_server.api") and imports_of(module.anywhere, "torch")
    ]
    assert guilty == []


def test_only_http_and_serving_know_http() -> None:
    """The engine, the base and the policy must run without a web framework."""
    for part in ("loramux_server.engine", "loramux_server.base"):
        for module in modules().values():
            if module.name.startswith(part):
                for package in ("fastapi", "starlette", "uvicorn", "loramux_server.api"):
                    assert not imports_of(module.anywhere, package), f"{module.name} imports {package}"


def test_files_stay_short() -> None:
    lengths = {module.name: len(module.path.read_text().splitlines()) for module in modules().values()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_stay_short() -> None:
    long = {
        f"{module.name}.{node.name}": length
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        # from the first statement on: the parameters of a command are its documentation
        and (length := (node.end_lineno or 0) - node.body[0].lineno + 1) > MAX_FUNCTION_LINES
    }
    assert long == {}
