"""Preconditioned factors: their product moves as the dense weight would."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.cases import (
    EXACT,
    at,
    build,
    difference,
    error_of,
    factored,
    pairs,
    read,
    with_kernel,
)
from torch import Tensor, nn

import deeptwist as dt
from deeptwist.app.data import load_data
from deeptwist.app.training.recipe import make_recipe
from deeptwist.app.training.run import TrainingRun, build_run, train
from deeptwist.decompositions import FactoredLayer
from deeptwist.layers.geometry import weight_to_kernel

GEOMETRIES = ["3x3", "groups", "linear", "1-D", "transposed 2-D", "3-D groups"]
STEP = 1e-6


def factors(layer: FactoredLayer) -> tuple[Tensor, ...]:
    """Return a layer's factors, of its parameters as they are."""
    method, convolution = layer.decomposition, layer.convolution
    weights = [p.detach() for n, p in layer.named_parameters() if not n.endswith("bias")]
    stored = zip(weights, method.parts(convolution), strict=True)
    kernels = [weight_to_kernel(w.reshape(part.weight_shape), part) for w, part in stored]
    return method.tensors(kernels, convolution.kernel_shape)


def product(layer: FactoredLayer) -> Tensor:
    """Return the kernel that a layer stands for."""
    return layer.decomposition.reconstruct(factors(layer), layer.convolution.kernel_shape)


def moved(layer: FactoredLayer, x: Tensor, lr: float = STEP) -> Tensor:
    """Return by how much a step of SGD moves the product, per learning rate."""
    layer.requires_grad_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    dt.precondition(layer, optimizer, damping=0)
    before = product(layer)
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).sin().reshape(y.shape)).sum().backward()
    optimizer.step()
    return (product(layer) - before) / lr


def dense_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    layer.requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).sin().reshape(y.shape)).sum().backward()
    return weight_to_kernel(layer.weight.grad, read(layer)[0])


@pytest.mark.parametrize(("method", "geometry"), pairs(EXACT, GEOMETRIES))
def test_factors_can_be_read_from_kernels(method: dt.Decomposition, geometry: str) -> None:
    convolution, kernel = read(build(geometry)[0])
    found = at(method, convolution, 0.5).decompose(kernel)
    again = found.decomposition.tensors(found.kernels(), found.shape)
    assert all(map(torch.equal, found.tensors, again))


@pytest.mark.parametrize(("method", "geometry"), pairs(EXACT, GEOMETRIES))
def test_the_product_moves_by_the_projection_of_the_dense_gradient(
    method: dt.Decomposition, geometry: str
) -> None:
    layer, x = build(geometry)
    method = at(method, read(layer)[0], 0.5)
    found, small = factored(layer, method)
    gradient = dense_gradient(with_kernel(layer, found.reconstruct()), x)
    # All that small steps of the factors can reach, by brute force in fp64.
    jacobians = torch.func.jacrev(lambda tensors: method.reconstruct(tensors, found.shape))(
        found.tensors
    )
    reach = torch.cat([j.reshape(gradient.numel(), -1) for j in jacobians], dim=1).numpy()
    steps = np.linalg.lstsq(reach, gradient.flatten().numpy(), rcond=1e-10)[0]
    projection = torch.from_numpy(reach @ steps).reshape(gradient.shape)
    assert difference(-projection, moved(small, x)) < 1e-4


@pytest.mark.parametrize("method", [dt.SVD(), dt.SpatialSVD(), dt.Tucker(), dt.TiledSVD()])
def test_how_scale_is_spread_over_factors_changes_nothing(method: dt.Decomposition) -> None:
    layer, x = build("groups")
    _, small = factored(layer, at(method, read(layer)[0], 0.5))
    expected = moved(small, x)
    _, small = factored(layer, at(method, read(layer)[0], 0.5))
    first, *_, last = [p for n, p in small.named_parameters() if not n.endswith("bias")]
    first.detach().mul_(100)
    last.detach().div_(100)
    assert difference(expected, moved(small, x)) < 1e-3


def test_layers_of_one_kind_are_stepped_as_alone() -> None:
    dense = [nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3), nn.ConvTranspose2d(6, 6, 3)]
    layers = nn.Sequential(*(factored(x, dt.Tucker(rank=(2, 3)))[1] for x in dense))
    alone = copy.deepcopy(layers)
    for model, parts in ((layers, [layers]), (alone, alone)):
        optimizer = torch.optim.SGD(model.parameters())
        for part in parts:
            dt.precondition(part, optimizer)
        model(torch.ones(2, 6, 9, 9)).square().sum().backward()
        optimizer.step()
    for together, each in zip(layers.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(together, each, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_preconditioned_is_refused() -> None:
    _, small = factored(build("3x3")[0].requires_grad_(), dt.CP(rank=2))
    others = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    assert "holds no factored layer" in error_of(dt.precondition, small, others)
    optimizer = torch.optim.SGD(small.parameters())
    assert "layer '0': CP(rank=2)" in error_of(dt.precondition, nn.Sequential(small), optimizer)


def job(mode: str = "finetune", precondition: bool = True, after: int | None = None) -> TrainingRun:
    torch.manual_seed(0)
    head = nn.Flatten(), nn.Linear(128, 10)
    network = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), *head)
    recipe = {
        "model": "none",
        "mode": mode,
        "interval": 10**6,
        "schedule": {"epochs": 1},
        "optimizer": {"precondition": precondition},
        "compression": {"decomposition": "svd", "ratio": 2, "linear": True},
        "finetune_after": after and {"epochs": after, "lr": 0.05},
        "logging": {"images": 0, "checkpoint_every": 3},
    }
    return build_run(make_recipe(recipe), load_data("digits"), name="run", model=network)


def test_a_run_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    def stop() -> None:
        if next(count) == 5:
            raise KeyboardInterrupt

    count = itertools.count(1)
    with pytest.raises(KeyboardInterrupt):
        train(job(), tmp_path / "cut", latency_batch=None, on_step=stop)
    jobs = {"cut": job(), "whole": job(), "plain": job(precondition=False)}
    losses = {
        name: train(run, tmp_path / name, resume=True, latency_batch=None)["loss"]
        for name, run in jobs.items()
    }
    assert losses["cut"] == losses["whole"] != losses["plain"]


def test_a_tail_is_preconditioned_and_the_dense_epochs_before_it_are_not(tmp_path: Path) -> None:
    results = [
        train(job("deeptwist", each, after=1), tmp_path / str(each), latency_batch=None)
        for each in (True, False)
    ]
    assert results[0]["loss"] == results[1]["loss"]
    assert results[0]["variants"][0]["loss"] != results[1]["variants"][0]["loss"]


def test_a_mode_without_factors_has_nothing_to_precondition() -> None:
    values = {"model": "resnet20", "optimizer": {"precondition": True}}
    assert "trains no factors" in error_of(make_recipe, values)
