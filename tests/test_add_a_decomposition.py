"""The page's example keeps the laws."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from tests.cases import at, build, difference, factored, read, with_kernel

PAGE = Path(__file__).parents[1] / "docs" / "add-a-decomposition.md"


@pytest.mark.parametrize("geometry", ["3x3", "groups", "linear", "1-D", "transposed 2-D", "3-D"])
def test_the_example_of_the_page(geometry: str) -> None:
    module = ModuleType("example_of_the_page")
    sys.modules[module.__name__] = module  # dataclasses look it up
    exec(PAGE.read_text(encoding="utf-8").split("```")[1].removeprefix("python"), vars(module))
    layer, x = build(geometry)
    convolution, kernel = read(layer)
    for share in (0.5, 1.0):
        method = at(module.InputBasis(), convolution, share)
        factors, small = factored(layer, method)
        assert difference(with_kernel(layer, factors.reconstruct())(x), small(x)) < 1e-11
        stored = sum(p.numel() for n, p in small.named_parameters() if not n.endswith("bias"))
        assert stored == method.weight_numel(convolution)
        warm = method.decompose(factors.reconstruct(), factors).reconstruct()
        assert difference(factors.reconstruct(), warm) < 1e-6
    assert difference(kernel, factors.reconstruct()) < 1e-10
