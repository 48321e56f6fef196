"""The house of ../shared/design.md: a module imports only from lower floors."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import deeptwist

ROOT = Path(deeptwist.__file__).parent

# From the ground up; a module imports only from floors below its own.
FLOORS = [
    {"_version", "errors", "files", "machine", "memory", "timing", "lowering", "tiling"},
    {"convolution", "extras", "ranks", "sharing"},
    {"cost", "linalg", "decompositions.routing"},
    {"subspace", "decompositions.windows"},
    {"decompositions.base"},
    {"decompositions.matrix", "decompositions.tiled_layer"},
    {"decompositions.svd", "decompositions.spatial_svd", "decompositions.tiled_svd"},
    {"decompositions.tucker", "decompositions.cp"},
    {"decompositions"},
    {"inspection", "rules"},
    {"planning"},
    {"tuning"},
    {"factorization"},
    {"tracking"},
    {"distortion", "artefact"},
    {""},  # the package itself: the public names
    {"export"},
    {"benchmark"},
    {"models", "data"},
    {"training", "integrations"},
    {"report"},
    {"demo", "reproduce"},
    {"cli"},
    {"__main__"},
]
CORE = set.union(*FLOORS[: FLOORS.index({""}) + 1])
ALLOWED = {"torch", "numpy", "safetensors"} | set(sys.stdlib_module_names)
HEAVY = {
    "torchvision",
    "timm",
    "lightning",
    "transformers",
    "accelerate",
    "typer",
    "rich",
    "matplotlib",
    "sklearn",
    "jinja2",
    "PIL",
    "onnx",
    "onnxruntime",
    "onnxscript",
}


def modules() -> dict[str, Path]:
    """Every module's name, without the package's, and its file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(path: Path) -> set[str]:
    """All absolute names that a file imports, at its head or in a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(name: str) -> str | None:
    """The module of ours that an import reads; none where it is another package's."""
    head, _, rest = name.partition(".")
    if head != "deeptwist":
        return None
    while rest not in MODULES:
        rest = rest.rpartition(".")[0]
    return rest


def floor_of(module: str) -> int:
    """A module's floor, or that of the folder that holds it."""
    while not any(module in floor for floor in FLOORS):
        assert module, "no floor for the module: add it to FLOORS"
        module = module.rpartition(".")[0]
    return next(number for number, floor in enumerate(FLOORS) if module in floor)


def room_of(module: str) -> str:
    """The folder of a module above the core; one of its own for a single file."""
    return module.partition(".")[0]


IMPORTS = {
    module: {target for name in imports_of(path) if (target := own(name)) is not None}
    for module, path in MODULES.items()
}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_floors(module: str) -> None:
    for target in IMPORTS[module] - {module}:
        neighbours = module not in CORE and room_of(module) == room_of(target)
        assert floor_of(target) < floor_of(module) or neighbours, f"{module} imports {target}"


def test_there_is_no_circle() -> None:
    order = list(TopologicalSorter(IMPORTS).static_order())
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("module", sorted(CORE & set(MODULES)))
def test_the_core_needs_torch_numpy_and_safetensors_alone(module: str) -> None:
    heads = {name.partition(".")[0] for name in imports_of(MODULES[module])}
    assert heads - {"deeptwist"} <= ALLOWED


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import deeptwist", HEAVY | {"torch"}),  # `deeptwist --help` does not wait for torch
        ("from deeptwist import *", HEAVY),
        ("import deeptwist.models, deeptwist.data, deeptwist.export", HEAVY),
    ],
)
def test_importing_is_light(statement: str, absent: set[str]) -> None:
    code = f"{statement}; import sys; print(sorted({absent!r} & set(sys.modules)))"
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert printed == "[]\n"


def test_the_public_names() -> None:
    fixed = {"plan", "DeepTwist", "decompose", "save", "load"}
    methods = {"SVD", "TiledSVD", "SpatialSVD", "Tucker", "CP"}
    assert fixed | methods <= set(deeptwist.__all__) <= set(dir(deeptwist))
    assert all(callable(getattr(deeptwist, name)) for name in fixed | methods)
    assert not hasattr(deeptwist, "pln")
