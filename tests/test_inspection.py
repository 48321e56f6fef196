"""What deeptwist cannot treat correctly is kept, and says why; planning touches nothing."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.cases import EVERY_LAYER, error_of, every_layer, works_or_is_refused
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from deeptwist import SVD, DeepTwist, Plan, decompose, load, plan, save
from deeptwist.inspection.run import Inputs, eval_mode
from deeptwist.inspection.usage import inspect_model

X = torch.randn(2, 8, 6, 6)


def plan_of(model: nn.Module, x: Tensor | tuple[Tensor, ...] = X) -> Plan:
    return plan(model, SVD(), ratio=1.5, example_input=x, layers=EVERY_LAYER)


def reason_of(model: nn.Module, name: str, x: Tensor = X) -> str | None:
    return next(
        getattr(layer, "reason", None) for layer in plan_of(model, x).layers if layer.name == name
    )


def conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1)


class Subclass(nn.Conv2d):
    """Computes something else, as timm's weight-standardised convolutions do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Calling(nn.Module):
    """Calls its convolutions as the function says."""

    def __init__(self, call: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, *self.layers)


def test_plain_layers_are_taken() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 9))
    assert [layer.name for layer in plan_of(model).compressed] == ["0", "3"]
    assert not plan_of(model).kept  # normalisation has no weights in this sense


def test_a_subclass_is_kept() -> None:
    model = nn.Sequential(Subclass(8, 8, 3), conv())
    assert "is a Subclass" in str(reason_of(model, "0"))
    assert [layer.name for layer in plan_of(model).compressed] == ["1"]


def checked_finish(model: nn.Module, x: Tensor = X) -> nn.Module:
    """Every layer is compressed, twisted and deployed, and the deployed network is exact."""
    made = plan_of(model, x)
    assert not made.kept
    twist = DeepTwist(model, made, interval=1)
    twist.step()
    small = twist.finish()
    assert twist.output_difference is not None
    assert twist.output_difference < 1e-5
    return small.eval()


@pytest.mark.parametrize(
    "kind", ["StdConv2d", "ScaledStdConv2d", "StdConv2dSame", "ScaledStdConv2dSame"]
)
def test_timms_standardised_convolutions_are_exact(kind: str) -> None:
    layers = pytest.importorskip("timm.layers")
    checked_finish(nn.Sequential(getattr(layers, kind)(8, 8, 3, stride=2)))


def test_timms_same_padding_is_exact_at_every_size() -> None:
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(layers.Conv2dSame(8, 8, 3, stride=2))
    small = checked_finish(model)
    for size in (5, 6, 7, 8):  # the padding depends on the size
        x = torch.randn(2, 8, size, size)
        assert torch.allclose(small(x), model(x), atol=1e-5)


class Causal(nn.Conv1d):
    """Pads in its own forward, as audio networks do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (2 * self.dilation[0], 0)))


def test_a_causal_convolution_is_that_behind_a_padding() -> None:
    model = nn.Sequential(Causal(8, 8, 3, dilation=2))
    small = checked_finish(model, torch.randn(2, 8, 20))
    x = torch.randn(2, 8, 31)
    assert torch.allclose(small(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    "normalise",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_normalised_weight_is_written_through(
    normalise: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.Sequential(normalise(nn.Conv2d(8, 8, 3)), nn.ReLU(), normalise(nn.Conv2d(8, 8, 3)))
    model(X).sum().backward()
    small = checked_finish(model)
    assert not [name for name, _ in small.named_parameters() if "orig" in name or "_g" in name]


class InitOnly(nn.Conv2d):
    """Sets its arguments and nothing else, as torchvision's Conv3DSimple does."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, bias=False)


class OwnLinear(nn.Linear):
    """What timm's Linear is outside TorchScript."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


def test_a_subclass_that_computes_what_its_base_does_is_the_base() -> None:
    checked_finish(nn.Sequential(InitOnly(8), nn.ReLU(), InitOnly(8), OwnLinear(6, 6)))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_a_parametrized_weight_is_kept() -> None:
    model = nn.Sequential(conv(), conv())
    nn.utils.parametrize.register_parametrization(model[0], "weight", Halved())
    assert "parametrized" in str(reason_of(model, "0"))
    made = plan_of(model)
    assert made.dense_parameters == sum(p.numel() for p in model.parameters())
    small = DeepTwist(model, made, interval=1).finish()
    assert torch.allclose(small(X), model(X), atol=1e-5)


def test_a_forward_of_its_own_is_kept() -> None:
    model = nn.Sequential(conv())
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    assert "forward of its own" in str(reason_of(model, "0"))


@pytest.mark.parametrize(
    "attach",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["forward", "forward pre", "backward", "backward pre", "pruning"],
)
def test_a_layer_with_hooks_is_kept(attach: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(conv())
    attach(model[0])
    assert reason_of(model, "0") is not None


def test_planning_leaves_no_hook_behind() -> None:
    model = nn.Sequential(conv(), nn.Linear(6, 6))
    plan_of(model)
    error_of(plan_of, model, torch.randn(2, 3, 6, 6))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_module_used_twice_is_one_layer_of_two_names() -> None:
    shared = conv()
    model = nn.Sequential(shared, nn.ReLU(), shared)
    (layer,) = plan_of(model).layers
    assert (layer.name, layer.aliases) == ("0", ("2",))
    assert len(layer.calls) == 2
    assert plan_of(model).dense_macs == 2 * 8 * 8 * 9 * 36
    small = decompose(model, plan_of(model))
    assert small[0] is small[2]


def test_a_shared_weight_is_kept_by_all_that_share_it() -> None:
    model = nn.Sequential(conv(), conv(), conv())
    model[1].weight = model[0].weight
    made = plan_of(model)
    assert [layer.name for layer in made.compressed] == ["2"]
    assert all("shares its weight" in str(layer.reason) for layer in made.kept)
    small = decompose(model, made)
    assert made.parameters == sum(p.numel() for p in small.parameters())
    assert small[0].weight is small[1].weight


def test_a_weight_shared_with_an_embedding_is_kept() -> None:
    model = Calling(lambda x, e, f: f(e(x.long())), nn.Embedding(12, 8), nn.Linear(8, 12))
    model.layers[1].weight = model.layers[0].weight
    assert "shares its weight" in str(reason_of(model, "layers.1", torch.zeros(2, 3)))


def test_a_layer_that_is_never_called_is_kept() -> None:
    model = Calling(lambda x, a, _: a(x), conv(), conv())
    assert reason_of(model, "layers.0") is None
    assert reason_of(model, "layers.1") == "is not called on the example input"


def test_a_weight_that_is_only_read_is_kept() -> None:
    model = Calling(lambda x, a, b: F.conv2d(a(x), b.weight), conv(), conv())
    assert reason_of(model, "layers.1") is not None
    assert decompose(model, plan_of(model))(X).shape == model(X).shape


def test_a_weight_that_is_read_besides_is_kept() -> None:
    """Called and read: a factored layer has no `weight` to read."""
    model = Calling(lambda x, a: a(x) + F.conv2d(x, a.weight, padding=1), conv())
    assert "its owner reads (conv2d)" in str(reason_of(model, "layers.0"))


def test_a_weight_that_linear_is_given_is_a_call() -> None:
    """As Swin, BEiT and EVA-02 give their qkv, with a bias of their own."""
    bias = torch.randn(6)
    model = Calling(
        lambda x, a, b: F.linear(F.linear(x, a.weight, a.bias), b.weight, bias),
        nn.Linear(6, 6),
        nn.Linear(6, 6),
    )
    assert len(plan_of(model).compressed[0].calls) == 1
    checked_finish(model)


def test_a_weight_whose_type_is_read_takes_no_memory() -> None:
    model = Calling(lambda x, a: a(x.to(a.weight.device, a.weight.dtype)), conv())
    small = checked_finish(model)
    assert small.layers[0].weight.shape == (8, 8, 3, 3)
    with pytest.raises(AttributeError, match="needs a dense weight"):
        small.layers[0].weight.data  # noqa: B018


def test_a_call_with_more_than_the_input_is_kept() -> None:
    up = nn.ConvTranspose2d(8, 8, 3, stride=2)
    model = Calling(lambda x, a: a(x, output_size=[14, 14]), up)
    assert reason_of(model, "layers.0") == "is called with more than its input"


def test_a_call_by_keyword_is_a_call() -> None:
    model = Calling(lambda x, a: a(input=x), conv())
    small = decompose(model, plan_of(model))
    assert reason_of(model, "layers.0") is None
    assert small(X).shape == X.shape


@pytest.mark.parametrize("reached", [True, False])
def test_a_lazy_layer_is_not_made_by_planning(reached: bool) -> None:
    model = Calling(lambda x, a, b: b(a(x)) if reached else a(x), conv(), nn.LazyConv2d(4, 3))
    works_or_is_refused(lambda: plan_of(model))  # kept or refused, but not made
    assert isinstance(model.layers[1], nn.LazyConv2d)


def test_a_factored_layer_is_not_factored_again() -> None:
    model = nn.Sequential(conv(), conv())
    small = decompose(
        model, plan(model, SVD(), ratio=2, example_input=X, layers=every_layer(include=["0"]))
    )
    again = plan_of(small)
    assert [layer.name for layer in again.compressed] == ["1"]
    assert {layer.reason for layer in again.kept} == {"is part of a factored layer"}


class Decoder(nn.Module):
    """A layer of torch's that attends to itself and to other inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 32, batch_first=True), 2)


SEQUENCES = torch.randn(2, 3, 8)


@pytest.mark.parametrize("training", [False, True])
def test_attention_is_exact(training: bool) -> None:
    model = encoder()
    small = checked_finish(model, SEQUENCES)
    for module in (*model.modules(), *small.modules()):
        if isinstance(module, nn.Dropout | nn.MultiheadAttention):
            setattr(module, "p" if isinstance(module, nn.Dropout) else "dropout", 0.0)
    model.train(training)
    small.train(training)
    last_padded = torch.zeros(2, 3, dtype=torch.bool)
    last_padded[1, 2] = True
    causal = nn.Transformer.generate_square_subsequent_mask(3)
    for options in ({}, {"src_key_padding_mask": last_padded}, {"mask": causal, "is_causal": True}):
        y, output = model(SEQUENCES, **options), small(SEQUENCES, **options)
        assert torch.allclose(y[~last_padded], output[~last_padded], atol=1e-5)


def test_torchs_fast_path_does_not_go_around_the_factors() -> None:
    small = checked_finish(encoder(), SEQUENCES)
    names = [name for name, _ in small.named_modules() if name.endswith("_proj")]
    assert len(names) == 4
    with torch.no_grad():
        y = small(SEQUENCES)
        for name in names:
            small.get_submodule(name)[0].weight.mul_(2)
            assert not torch.allclose(small(SEQUENCES), y, atol=1e-6)
            small.get_submodule(name)[0].weight.div_(2)


def test_an_in_projection_trains_loads_and_changes_its_type(tmp_path: Path) -> None:
    small = checked_finish(encoder(), SEQUENCES)
    loaded = load(save(small, tmp_path / "small"), encoder)
    assert torch.equal(loaded(SEQUENCES), small(SEQUENCES))
    loaded(SEQUENCES).square().sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    double = copy.deepcopy(small).double()
    assert double(SEQUENCES.double()).dtype == torch.float64
    assert torch.equal(loaded(SEQUENCES), small(SEQUENCES))  # the copy's factors are its own


def test_attention_gives_its_weights() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True, bias=False).eval()
    inputs = (SEQUENCES,) * 3
    twist = DeepTwist(model, plan_of(model, inputs), interval=1, example_input=inputs)
    small = twist.finish().eval()
    assert len(twist.plan.compressed) == 2
    for query, key in ((SEQUENCES, SEQUENCES), (SEQUENCES, SEQUENCES.flip(1))):  # self, and cross
        pairs = zip(model(query, key, key), small(query, key, key), strict=True)
        assert all(torch.allclose(y, output, atol=1e-5) for y, output in pairs)


def test_attention_to_other_inputs_is_kept() -> None:
    made = plan_of(Decoder(), SEQUENCES)
    assert [(layer.name, layer.reason) for layer in made.kept] == [
        ("layer.multihead_attn.in_proj", "projects keys or values of other inputs than queries")
    ]
    assert made.dense_parameters == sum(p.numel() for p in Decoder().parameters())
    assert decompose(Decoder(), made).eval()(SEQUENCES).shape == SEQUENCES.shape


def test_weights_given_to_torchs_attention_are_projections() -> None:
    """As in the pooling of OpenAI's CLIP: queries are means, keys and values everything."""

    def attend(x: Tensor, *layers: nn.Linear) -> Tensor:
        q, k, v, out = layers
        return F.multi_head_attention_forward(
            *(x.mean(0, keepdim=True), x, x, 8, 2, None, torch.cat([q.bias, k.bias, v.bias])),
            *(None, None, False, 0.0, out.weight, out.bias),
            use_separate_proj_weight=True,
            **{f"{n}_proj_weight": layer.weight for n, layer in zip("qkv", layers, strict=False)},
        )[0]

    model = Calling(attend, *(nn.Linear(8, 8) for _ in range(4)))
    made = plan_of(model, SEQUENCES)
    assert [layer.calls[0].count for layer in made.compressed] == [3, 6, 6, 3]
    checked_finish(model, SEQUENCES)


def test_weights_that_are_no_numbers_of_ours_are_kept() -> None:
    model = Calling(lambda x, a: a(x.to(torch.complex64)).real, conv().to(torch.complex64))
    assert "complex64" in str(reason_of(model, "layers.0"))


def test_nothing_is_modified_by_planning() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.Dropout(), conv()).train()
    model[1].eval()
    model(X).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradient = model[0].weight.grad.clone()
    parameters = dict(model.named_parameters())
    modes = {name: module.training for name, module in model.named_modules()}
    plan_of(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, gradient)
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert modes == {name: module.training for name, module in model.named_modules()}


def test_buffers_that_count_calls_are_put_back() -> None:
    model = nn.Sequential(conv())
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, _: module.calls.add_(1) and None)
    plan_of(model)
    assert model.calls == 0


def test_hooks_that_the_first_run_registers_are_taken_back() -> None:
    """As transformers does to capture outputs: a flag left out would register them twice."""

    class Captures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([conv(), conv()])
            self.captured: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "is_prepared"):
                self.is_prepared = True
                for layer in self.layers:
                    layer.register_forward_hook(lambda _, __, y: self.captured.append(y))
            self.captured.clear()
            for layer in self.layers:
                x = layer(x)
            return torch.stack(self.captured).sum() + 0 * x

    model = Captures()
    expected = model(X)
    model = Captures()
    plan_of(model)
    plan_of(model)
    assert not model.layers[0]._forward_hooks
    assert model(X).shape == expected.shape
    assert len(model.captured) == 2


def test_the_mode_comes_back_even_after_an_error() -> None:
    model = nn.Sequential(conv(), nn.Dropout()).train()
    model[1].eval()

    def fail() -> None:
        with eval_mode(model):
            assert not model.training
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert model.training
    assert not model[1].training


def test_layers_come_in_the_models_order_with_their_turn() -> None:
    model = Calling(lambda x, a, b, c: a(c(x)), conv(), conv(), conv())
    layers, _ = inspect_model(model, Inputs.of(X))
    assert [layer.names[0] for layer in layers] == ["layers.0", "layers.1", "layers.2"]
    assert layers[2].call_order < layers[0].call_order < layers[1].call_order


def test_legacy_weight_norm_does_not_stop_the_others() -> None:
    """Its weight is no leaf once it has run, which `deepcopy` refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.utils.weight_norm(conv()), conv())
    model(X).sum().backward()
    made = plan_of(model)
    assert [layer.name for layer in made.compressed] == ["0", "1"]
    assert decompose(model, made)(X).shape == X.shape


def test_a_model_that_is_one_layer() -> None:
    model = conv()
    made = plan_of(model)
    assert [layer.name for layer in made.compressed] == [""]
    small = DeepTwist(model, made, interval=1).finish()
    assert torch.allclose(small(X), model(X), atol=1e-5)
