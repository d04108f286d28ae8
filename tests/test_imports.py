"""Imports go one way, down the data flow, and reach only for packages that pyproject.toml declares."""

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from maxlm import cli

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "maxlm"

# Parts of maxlm (maxlm/<part>.py or maxlm/<part>/) that a part may import besides itself. The attention kernel, the
# layer stack, the expert dispatch and the matmul are passed to the model; sharding is its single way down.
MAY_IMPORT = {
    "config": {"config_file", "config_lora", "config_model", "config_quant"},
    "config_lora": {"config_model"},
    "config_model": {"places"},
    "config_quant": {"config_model"},
    "sharding": {"config"},
    "kernels": {"quant", "sharding"},
    "model": {"config", "sharding"},
    "data": {"chat", "commands", "config", "config_file", "places", "sharding", "storage"},
    "hardware": {"config", "config_file"},
    "launch": {"config", "config_file", "machines", "mesh", "places", "plan", "storage", "units"},
    "machines": {"config_file"},
    "convert": {
        *(
            "commands",
            "config",
            "config_lora",
            "config_model",
            "fingerprint",
            "json_object",
            "leaves",
            "manifest",
            "parameters",
            "progress",
        ),
        *("steps", "storage", "units"),
    },
}
# Parts that only these may import.
MAY_BE_IMPORTED_BY = {
    "trainer": {"cli", "__init__"},
    "cli": {"__main__"},
    "convert": {"cli", "infer"},
    "launch": {"cli"},
    "__main__": set(),
}
# Packages whose import name says nothing about who ships it, or that several ship.
SHIPPED_BY = {"yaml": "pyyaml", "orbax": "orbax-checkpoint", "array_record": "array-record", "lm_eval": "lm-eval"}
# Installed with a declared package on purpose: `jax` brings its own number types, grain its record files.
COMES_WITH = {"jaxlib": "jax", "ml-dtypes": "jax", "array-record": "grain", "etils": "orbax-checkpoint"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, module: str, *, inside_functions: bool) -> Iterator[str]:
    """Dotted names a module imports; relative ones resolved, `if TYPE_CHECKING:` left out.

    `from maxlm import optim` yields maxlm.optim: names imported from maxlm itself are parts.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not inside_functions:
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            name = ".".join(filter(None, [base, node.module]))
            yield from ([f"maxlm.{alias.name}" for alias in node.names] if name == "maxlm" else [name])
        else:
            yield from imports(node, module, inside_functions=inside_functions)


def imported_by(path: Path, *, inside_functions: bool = True) -> set[str]:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return set(imports(ast.parse(path.read_text()), module, inside_functions=inside_functions))


def parts_imported_by(path: Path, *, inside_functions: bool = True) -> set[str]:
    """Parts of maxlm a file imports, its own left out."""
    names = imported_by(path, inside_functions=inside_functions)
    return {name.split(".")[1] for name in names if name.startswith("maxlm.")} - {part_of(path)}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_part_imports_only_what_lies_below_it(path):
    part, found = part_of(path), parts_imported_by(path)
    if part in MAY_IMPORT:
        assert found <= MAY_IMPORT[part], f"{part} may not import {sorted(found - MAY_IMPORT[part])}"
    for name in found & MAY_BE_IMPORTED_BY.keys():
        assert part in MAY_BE_IMPORTED_BY[name], f"{part} may not import {name}"


def test_parts_do_not_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for path in sources():
        if part_of(path) != "__init__":
            graph.setdefault(part_of(path), set()).update(parts_imported_by(path))
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_are_declared_dependencies(path):
    """At the top of a file: of the plain install. Inside a function: of an extra that users install, too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    plain = {distribution(r) for r in project["dependencies"]}
    extra = {distribution(r) for name, rs in extras.items() if name not in ("test", "oracles", "lint") for r in rs}

    anywhere, at_top = third_party(imported_by(path)), third_party(imported_by(path, inside_functions=False))
    assert at_top <= plain, f"not in dependencies: {sorted(at_top - plain)}"
    assert anywhere <= plain | extra, f"in no extra: {sorted(anywhere - plain - extra)}"


def distribution(requirement: str) -> str:
    """`jax[tpu]>=1; marker` -> jax."""
    match = re.match(r"[\w.-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


packages_distributions = functools.cache(importlib.metadata.packages_distributions)


def third_party(names: set[str]) -> set[str]:
    """The distributions behind import names, without the standard library and maxlm."""
    shipped = packages_distributions()
    tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"maxlm"}
    found = {distribution(SHIPPED_BY.get(top) or shipped.get(top, [top])[0]) for top in tops}
    return {COMES_WITH.get(name, name) for name in found}


def test_the_command_line_is_parsed_without_jax():
    code = "import sys; from maxlm import cli; cli._parser(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_command_is_parsed_without_the_others():
    for name in cli.PARTS:
        assert f" {name} " in cli._parser(name).format_help(), name
    code = "import sys; from maxlm import cli; cli._parser('convert'); sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
