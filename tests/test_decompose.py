import copy
import math
from itertools import chain
from threading import Lock
from typing import Any

import pytest
import torch
from tests.cases import (
    EVERY_LAYER,
    GEOMETRIES,
    PLANNED_METHODS,
    build,
    difference,
    error_of,
    every_layer,
)
from torch import Tensor, nn

from deeptwist import CP, SVD, Decomposition, DeepTwist, Layers, TiledSVD, decompose, plan
from deeptwist.decompose import factorize
from deeptwist.decompositions import FactoredLayer
from deeptwist.networks.build import build_model

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
EACH_METHOD = pytest.mark.parametrize("method", PLANNED_METHODS.values(), ids=PLANNED_METHODS)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1),
        nn.Conv2d(8, 8, 1, bias=False),
    )


def decomposed(model: nn.Module, method: Decomposition, layers: Layers = EVERY_LAYER) -> nn.Module:
    return decompose(model, plan(model, method, ratio=1.6, example_input=X, layers=layers))


def storages(model: nn.Module) -> set[int]:
    tensors = chain(model.parameters(), model.buffers())
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@EACH_METHOD
def test_the_copy_shares_nothing_with_the_model(method: Decomposition) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    small = decomposed(model, method)
    assert not storages(model) & storages(small)
    with torch.no_grad():
        for tensor in chain(small.parameters(), small.buffers()):
            tensor.fill_(7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(module, FactoredLayer) for module in model.modules())


@EACH_METHOD
def test_no_bias_appears_where_the_source_had_none(method: Decomposition) -> None:
    small = decomposed(network(), method)
    biases = [name for name, _ in small[0].named_parameters() if name.endswith("bias")]
    assert not biases
    assert not [name for name, _ in small[4].named_parameters() if name.endswith("bias")]
    dense = sum(p.numel() for p in network().parameters() if p.dim() == 1)
    assert sum(p.numel() for p in small.parameters() if p.dim() == 1) == dense


@EACH_METHOD
def test_it_computes_what_the_distorted_model_does(method: Decomposition) -> None:
    model = network().double()
    made = plan(model, method, ratio=1.6, example_input=X.double(), layers=EVERY_LAYER)
    small = decompose(model, made)
    twin = copy.deepcopy(model)
    DeepTwist(twin, made, 1).step()
    assert difference(twin.eval()(X.double()), small.eval()(X.double())) < 1e-11


@EACH_METHOD
def test_conventional_fine_tuning_reaches_every_factor(method: Decomposition) -> None:
    small = decomposed(network(), method).train()
    before = [parameter.detach().clone() for parameter in small.parameters()]
    optimizer = torch.optim.SGD(small.parameters(), 0.01, momentum=0.9)
    for _ in range(2):
        loss = (small(X) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for (name, parameter), old in zip(small.named_parameters(), before, strict=True):
        assert parameter.is_leaf, name
        assert not torch.equal(parameter, old), name


def test_fine_tuning_learns() -> None:
    torch.manual_seed(3)
    model = network().eval()
    target = model(X).detach()
    small = decomposed(model, SVD(), layers=every_layer(overrides={"*": 3.0}))
    optimizer = torch.optim.Adam(small.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss = (small(X) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@EACH_METHOD
def test_frozen_stays_frozen_and_training_stays_training(method: Decomposition) -> None:
    model = network()
    model[0].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    model.eval()
    model[3].train()
    small = decomposed(model, method)
    assert not any(p.requires_grad for p in small[0].parameters())
    trainable = {name: p.requires_grad for name, p in small[3].named_parameters()}
    assert trainable
    assert all(value != name.endswith("bias") for name, value in trainable.items())
    assert not small[0].training
    assert all(module.training for module in small[3].modules())


def test_old_gradients_are_not_carried_over() -> None:
    model = network()
    model(X).sum().backward()
    small = decomposed(model, SVD(), layers=every_layer(exclude=["4"]))
    assert all(parameter.grad is None for parameter in small.parameters())


def test_a_tied_module_stays_tied() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared), nn.Conv2d(8, 8, 1))
    small = decomposed(model, CP(rank=3))
    assert small[0] is small[1][1]
    assert isinstance(small[0], FactoredLayer)
    assert len(list(small.parameters())) == len({id(p) for p in small.parameters()})
    names = [name for name, _ in small.named_parameters(remove_duplicate=False)]
    assert any(name.startswith("1.1.") for name in names)


def test_kept_weights_that_are_tied_stay_tied() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    small = decomposed(model, SVD(), layers=every_layer(include=["0"]))
    assert small[1].weight is small[2].weight


def test_what_surrounds_the_layers_is_copied_too() -> None:
    model = network()
    model.classes = ["cat", "dog"]
    small = decomposed(model, SVD())
    assert type(small) is nn.Sequential
    assert small.classes == ["cat", "dog"]
    assert small.classes is not model.classes
    assert [type(module) for module in small][1:3] == [nn.BatchNorm2d, nn.ReLU]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@EACH_METHOD
def test_all_convolutions_run_in_channels_last(
    method: Decomposition, memory_format: torch.memory_format
) -> None:
    model = network().to(memory_format=memory_format)
    small = decomposed(model, method, Layers(linear=True))  # the first stays dense
    assert all(
        p.is_contiguous(memory_format=torch.channels_last)
        for p in small.parameters()
        if p.dim() == 4
    )
    if method.method != "tiled_svd":  # some tiles are one channel each, which tells no format
        assert small(X).is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=memory_format)


class Viewed(nn.Module):
    """What cannot run in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).view(len(x), -1)


def test_a_network_that_views_its_activations_keeps_its_memory_format() -> None:
    model = Viewed().eval()
    small = decomposed(model, SVD())
    finished = DeepTwist(model, plan(model, SVD(), ratio=1.6, example_input=X), 1).finish()
    for network_ in (small, finished):
        assert all(p.is_contiguous() for p in network_.parameters())
        assert network_(X).shape == (2, 8 * 6 * 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@EACH_METHOD
def test_types_stay(method: Decomposition, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    small = decompose(
        model, plan(model, method, ratio=1.6, example_input=X.to(dtype), layers=EVERY_LAYER)
    )
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small.eval()(X.to(dtype)).isfinite().all()


@EACH_METHOD
def test_all_of_a_layer_is_where_its_kernels_are(method: Decomposition) -> None:
    for layer in plan(network(), method, ratio=1.6, example_input=X, layers=EVERY_LAYER).compressed:
        assert layer.convolution is not None
        assert layer.decomposition is not None
        parts = [
            part for level in layer.decomposition.convolutions(layer.convolution) for part in level
        ]
        kernels = [torch.empty(part.kernel_shape, device="meta") for part in parts]
        made = layer.decomposition.make_layer(layer.convolution, kernels, None)
        assert {t.device.type for t in chain(made.parameters(), made.buffers())} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@EACH_METHOD
def test_the_device_stays(method: Decomposition) -> None:
    model, x = network().cuda(), X.cuda()
    made = plan(model, method, ratio=1.6, example_input=x, layers=EVERY_LAYER)
    small = DeepTwist(model, made, 1, example_input=X).finish()  # X is not on the GPU
    assert {t.device.type for t in chain(small.parameters(), small.buffers())} == {"cuda"}
    assert small(x).is_cuda


@pytest.mark.parametrize("geometry", GEOMETRIES)
@EACH_METHOD
def test_every_kind_of_layer_is_swapped_or_kept(method: Decomposition, geometry: str) -> None:
    layer, x = build(geometry)
    model = nn.Sequential(layer)
    made = plan(
        model,
        method,
        ratio=1.3 if method.method != "cp" else 4,
        example_input=x,
        layers=EVERY_LAYER,
    )
    twist_able = bool(made.compressed)
    small = decompose(model, made)
    assert isinstance(small[0], FactoredLayer) == twist_able
    if not twist_able:
        assert made.kept[0].reason
        assert torch.equal(small(x), model(x))
    else:
        assert difference(model(x), small(x)) < 1.5  # something like the layer, in its shape
    stored = sum(p.numel() for p in small.parameters())
    assert stored == made.parameters


class Keeps(nn.Module):
    """Keeps an output for a loss, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 16, 3)
        self.kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        self.kept = y.mean()
        return y


def test_an_output_that_a_module_keeps_is_no_obstacle() -> None:
    model = Keeps()
    made = plan(model, SVD(), ratio=2, example_input=X, layers=EVERY_LAYER)
    model(X)
    assert model.kept is not None
    small = decompose(model, made)
    assert model.kept.requires_grad
    assert small.kept.item() == model.kept.item()
    assert not small.kept.requires_grad


def test_a_model_that_cannot_be_copied_is_named() -> None:
    class Single(nn.ReLU):
        def __deepcopy__(self, memo: object) -> "Single":
            raise RuntimeError("there can be only one")

    model = network()
    model[2] = Single()
    made = plan(model, SVD(), ratio=2, example_input=X, layers=EVERY_LAYER)
    assert "cannot be copied: there can be only one" in error_of(decompose, model, made)


class CorrelationBlock:
    """A plain object that holds an output, as RAFT's does."""

    def __init__(self, x: Tensor) -> None:
        self.pyramid = {"levels": [x]}


def test_what_a_module_holds_besides_is_no_obstacle() -> None:
    model = network()
    model.lock, model.generator = Lock(), (x for x in ())  # type: ignore[var-annotated]
    twist = DeepTwist(
        model, plan(model, SVD(), ratio=2, example_input=X, layers=EVERY_LAYER), interval=1
    )
    model.features = [model(X)]
    model.block = CorrelationBlock(model.features[0])
    twist.step()
    small = twist.finish()
    assert small.lock is model.lock
    assert not small.block.pyramid["levels"][0].requires_grad


def test_hooks_that_are_lost_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    made = plan(model, SVD(), ratio=2, example_input=X, layers=EVERY_LAYER)
    name = made.compressed[0].name
    model.get_submodule(name).register_forward_hook(lambda *_: None)
    decompose(model, made)
    assert [record.message for record in caplog.records] == [
        f"layer {name!r} carries hooks, which its factors will not"
    ]


def test_weights_that_are_not_finite_are_named() -> None:
    model = network()
    made = plan(model, SVD(), ratio=1.6, example_input=X, layers=EVERY_LAYER)
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = math.inf
    assert "'3'" in error_of(decompose, model, made)


def test_decomposing_twice_is_refused() -> None:
    model = network()
    made = plan(model, SVD(), ratio=1.6, example_input=X, layers=EVERY_LAYER)
    assert "decomposed already" in error_of(decompose, decompose(model, made), made)


def test_factorize_touches_nothing_and_names_every_layer() -> None:
    model = network()
    made = plan(model, TiledSVD(tile=(4, 9)), ratio=1.6, example_input=X, layers=EVERY_LAYER)
    before = copy.deepcopy(model.state_dict())
    assert list(factorize(model, made)) == [layer.name for layer in made.compressed]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_decomposed_model_prints_copies_and_pickles_as_any_other() -> None:
    import io

    small = decomposed(network(), TiledSVD(tile=(4, 18))).eval()
    assert "FactoredLayer[TiledSVD(rank=" in repr(small)
    assert torch.equal(copy.deepcopy(small)(X), small(X))
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    buffer.seek(0)
    twin = decomposed(network(), TiledSVD(tile=(4, 18))).eval()
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(twin(X), small(X))


def test_a_decomposed_network_can_be_exported() -> None:
    with torch.no_grad():
        model = build_model("resnet20").eval()
    x = torch.randn(2, 3, 32, 32)
    for method in (TiledSVD(tile=(16, 40)), CP(rank=2)):
        made = plan(
            model, method, ratio=3, example_input=x, layers=every_layer(include=["layer3.*"])
        )
        small = decompose(model, made).eval()
        exported = torch.export.export(small, (x,)).module()
        assert difference(small(x), exported(x)) < 1e-5


def test_a_tensor_is_read_by_nobody_else(tmp_path: Any) -> None:
    """Every factor owns its memory: a slice of a larger tensor would be saved as the whole."""
    small = decomposed(network(), TiledSVD(tile=(3, 7)))
    for name, parameter in small.named_parameters():
        held = parameter.untyped_storage().nbytes()
        assert held == parameter.numel() * parameter.element_size(), name


def test_equal_inputs_give_equal_factors() -> None:
    model = network()
    first, second = decomposed(model, CP(rank=3)), decomposed(model, CP(rank=3))
    pairs: list[tuple[Tensor, Tensor]] = list(
        zip(first.parameters(), second.parameters(), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_layers_that_autocast_runs_are_compared_in_their_own_type() -> None:
    """Where the outputs prove nothing, each layer is run by itself, outside of autocast."""

    class Indices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3)
            self.layer = nn.Conv2d(16, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(self.stem(x)).argmax(1)

    model, x = Indices(), torch.randn(2, 3, 8, 8)
    twist = DeepTwist(model, plan(model, SVD(), ratio=2, example_input=x), 1, example_input=x)
    small = twist.finish()
    assert isinstance(small.layer, FactoredLayer)
    assert twist.output_difference is not None
    assert twist.output_difference < 1e-5
