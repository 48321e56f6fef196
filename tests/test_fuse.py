"""Batch norm folds into the convolution that it alone follows, and nowhere else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cases import EVERY_LAYER, PLANNED_METHODS, difference, error_of
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules, get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from deeptwist import SVD, Decomposition, decompose, fuse, load, plan, save
from deeptwist.decompositions import FactoredLayer

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
EACH_METHOD = pytest.mark.parametrize("method", PLANNED_METHODS.values(), ids=PLANNED_METHODS)


def norm_of(channels: int, kind: type = nn.BatchNorm2d) -> nn.Module:
    norm = kind(channels)
    norm.running_mean, norm.running_var = torch.randn(channels), torch.rand(channels) + 0.5
    return norm


@pytest.mark.parametrize("geometry", ["3x3", "1d", "grouped", "transposed", "transposed groups"])
@EACH_METHOD
def test_batch_norm_folds_into_the_last_factors(method: Decomposition, geometry: str) -> None:
    layers = {
        "3x3": (nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), X),
        "1d": (nn.Conv1d(8, 12, 3, bias=False), nn.BatchNorm1d(12), X[..., 0]),
        "grouped": (nn.Conv2d(8, 12, 3, groups=2), nn.BatchNorm2d(12, affine=False), X),
        "transposed": (nn.ConvTranspose2d(8, 12, 3, stride=2), nn.BatchNorm2d(12), X),
        "transposed groups": (nn.ConvTranspose2d(8, 12, 3, groups=2), nn.BatchNorm2d(12), X),
    }
    layer, norm, x = layers[geometry]
    norm.running_mean, norm.running_var = torch.randn(12), torch.rand(12) + 0.5
    model = nn.Sequential(layer, norm, nn.ReLU()).eval()
    made = plan(model, method, ratio=1.3, example_input=x, layers=EVERY_LAYER)
    if not made.compressed:
        pytest.skip(str(made.kept[0].reason))
    small = decompose(model, made)
    fused = fuse(small)
    assert isinstance(fused[1], nn.Identity)
    assert isinstance(small[1], nn.modules.batchnorm._BatchNorm)
    assert difference(small(x), fused(x)) < 1e-5


@EACH_METHOD
@pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])
def test_other_people_s_folding_works_on_factored_layers(
    method: Decomposition, linear: bool
) -> None:
    torch.manual_seed(0)
    layer, x = (nn.Linear(8, 12), X[:, :, 0, 0]) if linear else (nn.Conv2d(8, 12, 3), X)
    model = nn.Sequential(layer, norm_of(12, nn.BatchNorm1d if linear else nn.BatchNorm2d)).eval()
    made = plan(model, method, ratio=1.3, example_input=x, layers=EVERY_LAYER)
    if not made.compressed:
        pytest.skip(str(made.kept[0].reason))
    small = decompose(model, made).requires_grad_(False)
    expected = small(x)
    theirs: Any = fuse_linear_bn_eval if linear else fuse_conv_bn_eval
    folded = theirs(*small)
    assert isinstance(folded, FactoredLayer)
    assert difference(expected, folded(x)) < 1e-5
    assert difference(expected, small(x)) == 0  # theirs is a copy
    norm = fuse(small, x)[1]
    assert linear or difference(folded(x), theirs(folded, norm)(x)) == 0  # again
    with pytest.raises(AttributeError, match="needs a dense weight"):
        folded.weight * torch.ones(5)


class Graph(nn.Module):
    """Two convolutions and two norms, used in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.last = norm_of(8), norm_of(8)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "loop":  # which torch.fx cannot trace
            if x.sum() > 1e9:
                return x
            x = torch.stack(list(x))
        y = self.a(x)
        if self.way == "residual":
            y = self.norm(y) + y
        elif self.way == "in place":
            y = self.norm(y.relu_())
        elif self.way == "twice":
            y = self.norm(self.a(self.norm(y)))
        elif self.way == "hidden":
            y = self.norm(y) + torch.jit.trace(lambda x: 2 * x, X)(y)
        elif self.way != "skipped":
            y = self.norm(y)
        return self.last(self.b(y)) + (0 if self.way != "returned" else self.norm(y))


@pytest.mark.parametrize(
    ("way", "kept"),
    [
        *[("plain", []), ("loop", []), ("skipped", ["norm"]), ("in place", ["norm"])],
        *[("residual", ["norm"]), ("twice", ["norm"]), ("returned", ["norm"])],
    ],
)
def test_a_norm_folds_where_nothing_else_sees_what_is_before_it(way: str, kept: list[str]) -> None:
    model = Graph(way)
    small = decompose(model, plan(model, SVD(), ratio=2, example_input=X))  # the first stays dense
    for network, example in ((small, None), (model, X)):
        fused = fuse(network, example)
        norms = [n for n, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms == kept
        assert difference(network(X), fused(X)) < 1e-5
    assert isinstance(small.last, nn.BatchNorm2d)  # untouched
    if way == "plain":
        weight = fuse_conv_bn_eval(model.a, model.norm).weight
        assert torch.allclose(fused.a.weight, weight, atol=1e-6)


def test_what_a_run_does_not_show_is_refused() -> None:
    assert "outputs differ" in error_of(fuse, Graph("hidden"), X)
    assert "give example_input" in error_of(fuse, Graph("plain"))
    assert "give example_input" in error_of(fuse, Graph("plain"), X[:, :3])


def test_a_norm_that_does_more_stays() -> None:
    class Active(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    model = nn.Sequential(nn.Conv2d(8, 8, 3), Active(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    fused = fuse(model.eval(), X)
    assert isinstance(fused[1], Active)
    assert isinstance(fused[3], nn.Identity)
    assert difference(model(X), fused(X)) < 1e-5


def test_a_loaded_network_knows_what_it_is_called_with(tmp_path: Path) -> None:
    model = Graph("loop")
    made = plan(model, SVD(), ratio=2, example_input={"x": X})
    small = load(save(decompose(model, made), tmp_path / "small"), Graph("loop"))
    fused = fuse(small)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert difference(small(X), fused(X)) < 1e-5


def test_quantisation_aware_training_follows_the_decomposition() -> None:
    """In this order: decompose, prepare (batch norm is fused then), train, convert."""
    torch.manual_seed(0)
    layers = nn.Conv2d(8, 16, 3), norm_of(16), nn.ReLU(), nn.Conv2d(16, 16, 3), norm_of(16)
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).eval()
    small = decompose(model, plan(model, SVD(), ratio=2, example_input=X, layers=EVERY_LAYER))
    mapping = get_default_qat_qconfig_mapping("x86")
    prepared = prepare_qat_fx(copy.deepcopy(small).train(), mapping, (X,))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(X).square().mean().backward()
        optimizer.step()
    expected = prepared.eval()(X)
    quantised = convert_fx(prepared)
    kinds = [type(module).__module__ for module in quantised.modules()]
    assert sum("quantized" in kind for kind in kinds) >= 6  # two factors of each layer
    assert difference(expected, quantised(X)) < 0.1
    # Eager mode's: by the name of the last factor.
    fused = fuse_modules(small, [["0.1", "1"], ["3.1", "4"]])
    assert isinstance(fused[1], nn.Identity)
    assert difference(small(X), fused(X)) < 1e-5
