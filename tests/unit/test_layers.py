"""The house's layering as data: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"skive": ROOT / "compiler", "skive.passes": ROOT / "passes", "skive.kernels": ROOT / "kernels"}

# Lower layers first; a module imports from lower layers and, where listed together, from its own.
# A package stands for all its modules.
LAYERS: list[set[str]] = [
    {"skive.errors"},
    {"skive.types"},
    {"skive.ir", "skive.expr"},
    {"skive.ops"},
    {"skive.text", "skive.verify", "skive.rewrite", "skive.reference", "skive.frontend"},
    {"skive.pipeline"},
    {"skive.passes"},
]
# What the artefact side may never see: it works on the plan alone.
NEVER: dict[str, set[str]] = {
    "skive.plan": {"skive.ir", "skive.ops", "skive.pipeline", "skive.passes"},
    "skive.emit": {"skive.ir", "skive.ops", "skive.pipeline", "skive.passes"},
    "skive.runtime": {"skive.ir", "skive.ops", "skive.pipeline", "skive.passes", "skive.frontend"},
}
HEAVY = {"torch", "onnx", "onnxruntime", "openvino", "tvm"}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every Python module of the package."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return {n: p for n, p in found.items() if "build" not in p.parts}


MODULES = modules()


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names of the modules that the file at `path` imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in MODULES)
    return found


def layer(name: str) -> int | None:
    """The index of the layer that holds module `name`."""
    for i, members in enumerate(LAYERS):
        if any(name == m or name.startswith(m + ".") for m in members):
            return i
    return None


def within(name: str, packages: set[str]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def test_every_listed_module_exists() -> None:
    for name in {m for members in LAYERS for m in members} | set(NEVER):
        assert any(m == name or m.startswith(name + ".") for m in MODULES), name


@pytest.mark.parametrize("name", sorted(n for n in MODULES if layer(n) is not None))
def test_imports_point_downwards(name: str) -> None:
    own = layer(name)
    for target in imports(MODULES[name]) & set(MODULES) - {"skive"}:
        assert layer(target) is not None, f"{name} imports {target}, which no layer below lists"
        assert layer(target) <= own, f"{name} imports {target} from a higher layer"  # type: ignore[operator]


@pytest.mark.parametrize("package", NEVER)
def test_the_artefact_side_does_not_see_the_ir(package: str) -> None:
    for name in (n for n in MODULES if within(n, {package})):
        seen = {t for t in imports(MODULES[name]) if within(t, NEVER[package])}
        assert not seen, f"{name} imports {sorted(seen)}"


# Reading and writing other formats is all that these do.
FOREIGN = {"skive.frontend", "skive.export", "skive.torch"}


@pytest.mark.parametrize("name", sorted(n for n in MODULES if not within(n, FOREIGN)))
def test_heavy_packages_are_imported_where_they_are_needed(name: str) -> None:
    heavy = {t for t in imports(MODULES[name], top_level_only=True) if t.split(".")[0] in HEAVY}
    # `skive.backend` *is* an onnx.backend.base.Backend.
    assert not heavy or name == "skive.backend", f"{name} imports {sorted(heavy)} when it is loaded"
