"""The rooms of the package: each imports only from the rooms before it, without circles."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import deeptwist

ROOT = Path(deeptwist.__file__).parent

# From the ground up; a room imports only from the rooms above it in this list.
LIBRARY = [
    "_version",
    "errors",
    "files",
    "distributed",
    "networks",
    "layers",
    "decompositions",
    "inspection",
    "measure",
    "plan",
    "decompose",
    "precondition",
    "twist",
    "distill",
    "save",
    "export",
    "search",
    "compress",
    "integrations",
]
EXTRAS = ["app"]  # behind the extra cli: the library imports none of it
CORE = {*LIBRARY[: LIBRARY.index("export")]}
# They import what belongs to extras when asked for it: onnxruntime to time it, torchvision's and
# timm's networks.
LATE = {"measure.runtimes", "networks.build", "networks.weights"}
ALLOWED = {"torch", "numpy", "safetensors"} | set(sys.stdlib_module_names)
HEAVY = {
    "torchvision",
    "timm",
    "lightning",
    "lightning_fabric",
    "transformers",
    "accelerate",
    "cyclopts",
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
    """Return every module's file by its name, without the package's."""
    files = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


MODULES = modules()


def imported_names(path: Path) -> set[str]:
    """Return all absolute names that a file imports, at its head or in a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_module(name: str) -> str | None:
    """Return the module of this package that an import reads, `None` for another package's."""
    head, _, rest = name.partition(".")
    if head != "deeptwist":
        return None
    while rest not in MODULES:
        rest = rest.rpartition(".")[0]
    return rest


def room_of(module: str) -> str:
    return module.partition(".")[0]


IMPORTS = {
    module: {own for name in imported_names(path) if (own := own_module(name)) is not None}
    for module, path in MODULES.items()
}


def test_the_root_shows_the_rooms_and_nothing_else() -> None:
    entries = {p.stem for p in ROOT.iterdir() if p.name not in ("__pycache__", "py.typed")}
    assert entries == {*LIBRARY, *EXTRAS, "__init__", "__main__"}


@pytest.mark.parametrize("module", [m for m in MODULES if m not in ("", "__main__")])
def test_a_room_imports_only_from_rooms_before_it(module: str) -> None:
    rooms = [*LIBRARY, *EXTRAS]
    allowed = {*rooms[: rooms.index(room_of(module)) + 1]}
    if room_of(module) in EXTRAS:
        allowed.add("")  # the public names
    assert {room_of(target) for target in IMPORTS[module]} <= allowed


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: targets - {module} for module, targets in IMPORTS.items()}
    assert set(TopologicalSorter(graph).static_order()) == set(MODULES)


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) in CORE and m not in LATE])
def test_the_library_needs_torch_numpy_and_safetensors_alone(module: str) -> None:
    heads = {name.partition(".")[0] for name in imported_names(MODULES[module])}
    assert heads - {"deeptwist"} <= ALLOWED


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import deeptwist", HEAVY | {"torch"}),  # `deeptwist --help` does not wait for torch
        ("from deeptwist import *", HEAVY),
        ("import deeptwist.networks.weights, deeptwist.app.data, deeptwist.export", HEAVY),
    ],
)
def test_importing_is_light(statement: str, absent: set[str]) -> None:
    code = f"{statement}; import sys; print(sorted({absent!r} & set(sys.modules)))"
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert printed == "[]\n"


def test_the_public_names() -> None:
    fixed = {"compress", "plan", "DeepTwist", "decompose", "save", "load"}
    methods = {"SVD", "TiledSVD", "SpatialSVD", "Tucker", "CP"}
    assert fixed | methods <= set(deeptwist.__all__) <= set(dir(deeptwist))
    assert all(callable(getattr(deeptwist, name)) for name in fixed | methods)
    assert set(dir(deeptwist)) == set(deeptwist.__all__)  # nothing that is not ours
    assert not hasattr(deeptwist, "pln")
