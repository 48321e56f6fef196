import copy
import json
import math
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.cases import (
    EVERY_LAYER,
    GEOMETRIES,
    METHODS,
    build,
    error_of,
    every_layer,
    spoiled,
    works_or_is_refused,
)
from torch import Tensor, nn

from deeptwist import (
    CP,
    SVD,
    Decomposition,
    DeepTwist,
    DeepTwistError,
    Layers,
    Plan,
    SpatialSVD,
    TiledSVD,
    Tucker,
    plan,
)
from deeptwist.decompositions.linalg import relative_error
from deeptwist.layers.geometry import ConvGeometry
from deeptwist.networks.build import build_model
from deeptwist.plan.latency import exclude_slow_layers
from deeptwist.plan.plan import CompressedLayer, KeptLayer


class Net(nn.Module):
    """The stem runs first, though it is defined last."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.Conv2d(32, 16, 1),
        )
        self.head = nn.Linear(16, 12)
        self.stem = nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return y


NAMES = ["body.0", "body.2", "body.3", "head", "stem"]
X = torch.randn(2, 8, 9, 9)


def make_plan(decomposition: Decomposition | None = None, **options: Any) -> Plan:
    options = {"ratio": 1.5, "example_input": X, "layers": EVERY_LAYER, **options}
    return plan(Net(), decomposition or SVD(), **options)


def compressed(made: Plan) -> list[str]:
    return [layer.name for layer in made.compressed]


def reasons(made: Plan) -> dict[str, str | None]:
    return {layer.name: layer.reason for layer in made.kept}


# --- rules


def test_without_rules_every_layer_is_compressed() -> None:
    assert [layer.name for layer in make_plan().layers] == NAMES
    assert compressed(make_plan()) == NAMES


def test_the_first_convolution_is_the_one_that_runs_first() -> None:
    assert reasons(make_plan(layers=every_layer(skip_first_conv=True))) == {
        "stem": "first convolution"
    }


def test_few_input_channels() -> None:
    made = make_plan(layers=every_layer(min_in_channels=17))
    assert compressed(made) == ["body.2", "body.3"]
    assert set(reasons(made).values()) == {"fewer than 17 input channels"}


def test_linear_layers_may_stay() -> None:
    assert reasons(make_plan(layers=every_layer(linear=False))) == {"head": "linear layer"}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("stem", ["stem"]),
        ("body.*", ["body.0", "body.2", "body.3"]),
        ("body.[02]", ["body.0", "body.2"]),
        ("re:body\\.[0-2]|head", ["body.0", "body.2", "head"]),
        ("re:.*", NAMES),
        ("*", NAMES),
    ],
)
def test_patterns_include_and_exclude(pattern: str, names: list[str]) -> None:
    rest = [name for name in NAMES if name not in names]
    assert compressed(make_plan(layers=every_layer(include=[pattern]))) == names
    assert compressed(make_plan(layers=every_layer(exclude=[pattern]))) == rest
    assert set(reasons(make_plan(layers=every_layer(include=[pattern]))).values()) <= {
        "not included"
    }
    assert set(reasons(make_plan(layers=every_layer(exclude=[pattern]))).values()) <= {"excluded"}


def test_exclusion_is_stronger_than_inclusion() -> None:
    assert compressed(make_plan(layers=every_layer(include=["body.*"], exclude=["*.0"]))) == [
        "body.2",
        "body.3",
    ]


@given(st.lists(st.sampled_from([*NAMES, "body.*", "*e*", "re:.*[023]"]), max_size=3))
@settings(max_examples=15)
def test_every_layer_is_in_the_plan_once_with_a_rank_or_a_reason(patterns: list[str]) -> None:
    made = make_plan(layers=every_layer(exclude=patterns))
    assert [layer.name for layer in made.layers] == NAMES
    for layer in made.layers:
        out = any(
            fnmatchcase(layer.name, p) or (p[:3] == "re:" and layer.name[-1] in "023")
            for p in patterns
        )
        assert isinstance(layer, KeptLayer if out else CompressedLayer)
    assert all(layer.reason for layer in made.kept)
    assert all(layer.relative_error is not None for layer in made.compressed)


def test_layers_are_chosen_by_a_function_too() -> None:
    def pointwise(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)

    made = make_plan(layers=pointwise)
    assert compressed(made) == ["body.3"]
    assert set(reasons(made).values()) == {"not chosen"}


def test_by_default_the_first_convolution_and_linear_layers_are_kept() -> None:
    kept = {"stem": "first convolution", "head": "linear layer"}
    assert reasons(plan(Net(), "svd", ratio=1.5, example_input=X)) == kept
    assert "min_in_channels" in error_of(Layers, min_in_channels=0)
    assert "did you mean 'tucker'?" in error_of(make_plan, "tuker")


def test_overrides() -> None:
    made = make_plan(
        layers=every_layer(
            overrides={
                "body.*": Tucker(),
                "body.2": CP(rank=5),
                "head": None,
                "stem": 2.5,
            }
        )
    )
    chosen = {layer.name: layer.decomposition for layer in made.compressed}
    assert "head" not in chosen
    assert "override" in str(reasons(made)["head"])
    assert chosen["body.2"] == CP(rank=5)
    assert isinstance(chosen["body.0"], Tucker)
    assert isinstance(chosen["body.3"], SVD)  # 1×1: Tucker's matrix case
    stem = next(layer for layer in made.compressed if layer.name == "stem")
    assert stem.weight_numel / stem.compressed_numel >= 2.5
    assert stem.decomposition == SVD().resolve(stem.convolution, 2.5)


def test_an_override_by_ratio_is_a_promise_beside_a_given_rank_too() -> None:
    made = make_plan(SVD(rank=8), ratio=None, layers=every_layer(overrides={"body.2": 10.0}))
    layer = next(layer for layer in made.compressed if layer.name == "body.2")
    assert layer.compressed_numel * 10 <= layer.weight_numel


def test_an_override_comes_before_the_rules() -> None:
    made = make_plan(
        layers=every_layer(skip_first_conv=True, exclude=["*"], overrides={"stem": SVD(rank=3)})
    )
    assert compressed(made) == ["stem"]


def test_the_last_matching_override_counts() -> None:
    assert compressed(make_plan(layers=every_layer(overrides={"*": None, "body.0": 2.0}))) == [
        "body.0"
    ]
    assert compressed(make_plan(layers=every_layer(overrides={"body.0": 2.0, "*": None}))) == []


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_mistyped_name_points_at_the_nearest(option: str) -> None:
    assert "did you mean 'stem'?" in error_of(make_plan, layers=every_layer(**{option: ["stm"]}))
    assert "did you mean 'body.2'?" in error_of(
        make_plan, layers=every_layer(**{option: ["*", "bodi.2"]})
    )


def test_other_patterns_that_mean_nothing() -> None:
    assert "did you mean 'head'?" in error_of(
        make_plan, layers=every_layer(overrides={"haed": None})
    )
    assert "'layer9.*'" in error_of(make_plan, layers=every_layer(exclude=["layer9.*"]))
    assert "'re:nothing'" in error_of(make_plan, layers=every_layer(include=["re:nothing"]))
    assert "no regular expression" in error_of(make_plan, layers=every_layer(include=["re:("]))


def test_what_is_asked_for_by_name_and_cannot_be_is_an_error() -> None:
    assert "'stem'" in error_of(make_plan, layers=every_layer(overrides={"stem": SVD(rank=99)}))
    assert "'head'" in error_of(make_plan, layers=every_layer(overrides={"head": 1000.0}))
    # by a pattern it is no more than a wish
    assert reasons(make_plan(layers=every_layer(overrides={"*": 1000.0}))).keys() == set(NAMES)


@pytest.mark.parametrize("ratio", [1, 0.5, -2, math.nan, math.inf])
def test_ratios_that_mean_nothing(ratio: float) -> None:
    assert "ratio" in error_of(make_plan, ratio=ratio)
    assert "ratio" in error_of(make_plan, layers=every_layer(overrides={"stem": ratio}))


def test_a_rank_or_a_ratio_is_needed() -> None:
    assert "no rank" in error_of(make_plan, ratio=None)
    assert "no rank" in error_of(
        make_plan, SVD(rank=2), ratio=None, layers=every_layer(overrides={"stem": CP()})
    )
    assert make_plan(SVD(rank=2), ratio=None).compressed


def test_an_example_that_the_model_refuses() -> None:
    error_of(make_plan, example_input=torch.randn(2, 3, 9, 9))


@pytest.mark.parametrize("example", [[torch.zeros(2, 8)], {"input": 8}, (), None])
def test_an_example_that_is_none(example: Any) -> None:
    with pytest.raises(DeepTwistError, match="neither a tensor, nor a tuple"):
        plan(nn.Linear(8, 8), SVD(), ratio=2, example_input=example, layers=EVERY_LAYER)


class Particular(nn.Sequential):
    """Asserts, as torchvision's transformers do, and holds a buffer that cannot be written to."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 16, 3))
        self.register_buffer("scale", torch.ones(1).expand(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.shape[-1] == 6, "wrong width")
        y: torch.Tensor = super().forward(x)
        return y


def test_a_model_that_asserts_and_has_an_expanded_buffer() -> None:
    assert plan(
        Particular(), SVD(), ratio=2, example_input=torch.zeros(1, 8, 6, 6), layers=EVERY_LAYER
    ).compressed
    with pytest.raises(DeepTwistError, match="wrong width"):
        plan(
            Particular(), SVD(), ratio=2, example_input=torch.zeros(1, 8, 7, 7), layers=EVERY_LAYER
        )


def test_one_vector_is_one_example() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
    single, batch = (
        plan(model, SVD(), ratio=1.1, example_input=x, layers=EVERY_LAYER)
        for x in (torch.zeros(12), torch.zeros(3, 12))
    )
    assert single.dense_macs == batch.dense_macs == 12 * 8 + 8 * 4


def test_one_pattern_is_a_pattern() -> None:
    assert compressed(make_plan(layers=every_layer(include="body.*"))) == compressed(
        make_plan(layers=every_layer(include=["body.*"]))
    )
    assert compressed(make_plan(layers=every_layer(exclude="body.*"))) == compressed(
        make_plan(layers=every_layer(exclude=["body.*"]))
    )


def test_weights_that_are_not_finite_are_named() -> None:
    model = Net()
    with torch.no_grad():
        model.body[2].weight[0, 0, 0, 0] = math.nan
    assert "'body.2'" in error_of(plan, model, SVD(), ratio=2, example_input=X)


# --- costs and promises


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@given(
    groups=st.integers(1, 4),
    out=st.integers(1, 24),
    into=st.integers(1, 24),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    ratio=st.floats(1.01, 12),
)
@settings(max_examples=25)
def test_no_layer_grows_and_a_ratio_is_a_promise(
    method: Decomposition,
    groups: int,
    out: int,
    into: int,
    kernel: tuple[int, int],
    stride: int,
    ratio: float,
) -> None:
    layer = nn.Conv2d(groups * into, groups * out, kernel, stride, groups=groups, device="meta")
    x = torch.empty(2, groups * into, 9, 9, device="meta")
    (planned,) = plan(layer, method, ratio=ratio, example_input=x, layers=EVERY_LAYER).layers
    if isinstance(planned, KeptLayer):
        assert planned.reason
        assert planned.compressed_numel == planned.weight_numel
    else:
        assert planned.compressed_numel * ratio <= planned.weight_numel
        made = Plan((planned,), examples=2)
        assert made.macs < made.dense_macs


@pytest.mark.parametrize("method", [SVD(), SpatialSVD(), TiledSVD(), CP(), Tucker()], ids=str)
@pytest.mark.parametrize("multiple", [4, 16])
def test_ranks_that_a_ratio_sets_are_rounded_down_to_multiples(
    method: Decomposition, multiple: int
) -> None:
    free, rounded = (
        plan(Net(), method, ratio=2, example_input=X, rank_multiple=m, layers=EVERY_LAYER)
        for m in (1, multiple)
    )
    assert free.compressed
    for before, after in zip(free.compressed, rounded.compressed, strict=True):
        for rank, kept in zip(ranks_of(before), ranks_of(after), strict=True):
            assert kept == (rank - rank % multiple if rank >= multiple else rank)


def test_a_given_rank_is_not_rounded() -> None:
    made = plan(Net(), SVD(rank=7), example_input=X, rank_multiple=4, layers=EVERY_LAYER)
    assert {ranks_of(layer) for layer in made.compressed} == {(7,)}
    with pytest.raises(DeepTwistError, match="rank_multiple 0 is not a whole number from 1 on"):
        plan(Net(), SVD(), ratio=2, example_input=X, rank_multiple=0, layers=EVERY_LAYER)


def ranks_of(layer: CompressedLayer) -> tuple[int, ...]:
    rank: int | tuple[int, ...] = getattr(layer.decomposition, "rank")  # noqa: B009
    return rank if isinstance(rank, tuple) else (rank,)


@pytest.mark.parametrize(
    "method", [SVD(rank=32), TiledSVD(rank=8, tile=(8, 8)), Tucker(fraction=1)]
)
def test_a_given_rank_that_would_grow_the_layer_is_not_followed(method: Decomposition) -> None:
    made = make_plan(method, ratio=None, layers=every_layer(include=["body.0"]))
    assert not made.compressed
    assert "would grow" in str(reasons(made)["body.0"])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("geometry", ["3x3", "groups", "linear", "1-D", "3-D", "transposed 2-D"])
def test_the_relative_error_is_what_a_decomposition_loses(name: str, geometry: str) -> None:
    layer, x = build(geometry)
    made = plan(layer, METHODS[name], ratio=1.5, example_input=x, layers=EVERY_LAYER)
    if made.kept:
        return
    (planned,) = made.compressed
    from deeptwist.layers.geometry import weight_to_kernel

    kernel = weight_to_kernel(layer.weight, planned.convolution)
    error = relative_error(kernel, planned.decomposition.decompose(kernel).reconstruct())
    assert 0 < planned.relative_error < 1
    slack = {"tucker": 0.25, "cp": 0.15}.get(planned.decomposition.method, 1e-6)
    assert error == pytest.approx(planned.relative_error, rel=slack)
    if planned.decomposition.method == "tucker":  # a bound
        assert error < planned.relative_error * (1 + 1e-6)


def test_totals_add_up() -> None:
    model, made = Net(), make_plan(layers=every_layer(skip_first_conv=True))
    assert made.dense_parameters == sum(p.numel() for p in model.parameters())
    saved = sum(layer.weight_numel - layer.compressed_numel for layer in made.compressed)
    assert made.parameters == made.dense_parameters - saved
    assert made.compression_ratio == made.dense_parameters / made.parameters
    assert made.macs < made.dense_macs


def test_planning_is_repeatable_and_touches_nothing() -> None:
    model = Net().train()
    before = copy.deepcopy(model.state_dict())
    first, second = (
        plan(model, CP(), ratio=2, example_input=X, layers=EVERY_LAYER) for _ in range(2)
    )
    assert first == second
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_on_meta_can_be_planned() -> None:
    with torch.device("meta"):
        model, x = build_model("resnet20"), torch.empty(1, 3, 32, 32)
    made = plan(
        model, SpatialSVD(), ratio=4, example_input=x, layers=every_layer(skip_first_conv=True)
    )
    assert len(made.compressed) > 15
    assert all(layer.relative_error is None for layer in made.compressed)


def test_the_paper_s_layers_of_resnet32() -> None:
    """Nine convolutions of 64 × 64 channels (Table 1), halved exactly by a 64 × 64 tile."""

    with torch.device("meta"):
        model, x = build_model("resnet32"), torch.empty(1, 3, 32, 32)
    made = plan(
        model,
        TiledSVD(tile=(64, 64)),
        ratio=2,
        example_input=x,
        layers=every_layer(linear=False, min_in_channels=64),
    )
    assert len(made.compressed) == 9
    assert {layer.decomposition for layer in made.compressed} == {TiledSVD(rank=16, tile=(64, 64))}
    assert made.compression_ratio == pytest.approx(1.56, abs=0.005)


# --- the table


def test_the_table_shows_every_layer() -> None:
    made = make_plan(TiledSVD(tile=(8, 36)), layers=every_layer(exclude=["head"]))
    table = str(made)
    lines = table.splitlines()
    header = ("layer", "shape", "lowered", "rank", "weights", "MACs", "relative error")
    assert all(word in lines[0] for word in header)
    assert "tiled_svd 8×36" in table
    assert "32×288" in table
    assert "kept: excluded" in table
    assert all(any(line.startswith(name) for line in lines) for name in NAMES)
    assert f"{made.parameters:,}" in lines[-1]


# --- JSON


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_json_round_trip_of_any_layer(method: Decomposition, geometry: str) -> None:
    make, shape = GEOMETRIES[geometry]
    made = plan(make(), method, ratio=3, example_input=torch.randn(shape), layers=EVERY_LAYER)
    assert Plan.from_json(made.to_json()) == made


def test_json_round_trip_of_everything_else() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(shared, nn.Embedding(3, 4), shared, nn.LSTM(3, 4), nn.Conv2d(8, 8, 1))
    model.forward = lambda x: shared(shared(x))  # type: ignore[method-assign]
    made = plan(model, SVD(), ratio=1.5, example_input=X, layers=EVERY_LAYER)
    assert Plan.from_json(made.to_json()) == made
    assert json.loads(made.to_json())["layers"][0]["aliases"] == ["2"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '"format"',
        "{" * 100_000,
        "[" * 100_000,
        '{"format": 3}',
        '{"format": 1}',
        '{"format": 3, "layers": 3, "other_parameters": 0, "inputs": []}',
        '{"format": 3, "layers": [], "other_parameters": "many", "inputs": []}',
        '{"format": 3, "layers": [], "other_parameters": Infinity, "inputs": []}',
        '{"format": 3, "layers": [], "other_parameters": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: text[:70],
)
def test_text_that_is_no_plan(text: str) -> None:
    assert "plan" in error_of(Plan.from_json, text)


SMALL = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3), nn.Conv2d(8, 8, 1))
SMALL_PLAN = plan(
    SMALL,
    TiledSVD(tile=(8, 9)),
    ratio=2,
    example_input=X,
    layers=every_layer(overrides={"1": CP(rank=3), "2": None}),
)


@given(spoiled(json.loads(SMALL_PLAN.to_json())))
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_a_spoiled_plan_is_refused_or_harmless(document: Any) -> None:
    text = json.dumps(document)
    works_or_is_refused(lambda: DeepTwist(copy.deepcopy(SMALL), Plan.from_json(text), 1).finish())
    works_or_is_refused(lambda: str(Plan.from_json(text)))


def test_a_plan_of_another_model_is_refused() -> None:
    made = make_plan()
    other = Net()
    other.body[2] = nn.Conv2d(32, 32, 3, padding=1, stride=2)
    assert "'body.2'" in error_of(DeepTwist, other, made, 1)
    other.body = nn.Sequential()
    assert "another model" in error_of(DeepTwist, other, made, 1)


def test_a_rank_that_was_edited_beyond_the_full_one_is_refused() -> None:
    document = json.loads(make_plan(layers=every_layer(include=["stem"])).to_json())
    document["layers"][-1]["decomposition"]["rank"] = 1000
    works = json.dumps(document)
    assert "1000" in error_of(lambda: DeepTwist(Net(), Plan.from_json(works), 1).finish())


def test_a_convolution_is_read_once() -> None:
    made = make_plan()
    stem = made.layers[-1]
    assert stem.convolution == ConvGeometry.from_module(Net().stem)
    assert stem.kind == "Conv2d"


def test_layers_that_do_not_get_faster_are_excluded() -> None:
    slow = exclude_slow_layers(Net(), make_plan(), 1e6)
    assert not slow.compressed
    assert all("not worth it: measured" in layer.reason for layer in slow.kept)
    assert "not above 0" in error_of(exclude_slow_layers, Net(), slow, 0)


def test_the_table_ends_with_what_is_kept_and_the_whole_networks_macs() -> None:
    """Attention's products of matrices are no layer's, and count all the same."""
    model = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    made = plan(
        model,
        SVD(),
        ratio=2,
        example_input=torch.randn(2, 5, 16),
        layers=every_layer(exclude="linear1"),
    )
    assert [layer.name for layer in made.kept] == ["linear1"]
    *_, note, total = str(made).splitlines()
    assert "kept, 1 layers" in note
    assert "excluded" in note
    assert "× in the whole network" in total
    assert made.network_macs == 5 * 16 * (48 + 16 + 64 + 64) + 2 * 5 * 5 * 16
    assert Plan.from_json(made.to_json()) == made
