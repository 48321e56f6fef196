"""DeepTwist in other people's loops: real libraries, counted and compared bit for bit."""

import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cases import EVERY_LAYER, every_layer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import deeptwist as dt
from deeptwist.decompositions import FactoredLayer
from deeptwist.integrations import after_each_step, use_averages

EXAMPLES = Path(__file__).parents[1] / "examples"
IMAGES, BATCH, INTERVAL, EPOCHS = 64, 8, 3, 2


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


needs_lightning, needs_transformers, needs_accelerate = map(
    needs, ("lightning", "transformers", "accelerate")
)


@pytest.fixture(autouse=True)
def _no_precision_of_another_test() -> None:
    """Accelerate keeps its state for the whole process, the precision in it."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 1, 8, 8, generator=generator)
    return TensorDataset(images, torch.randint(10, (IMAGES,), generator=generator))


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(data(), BATCH)


def twist_of(model: nn.Module) -> dt.DeepTwist:
    example = torch.zeros(2, 1, 8, 8)
    plan = dt.plan(
        model, dt.SVD(), ratio=2, example_input=example, layers=every_layer(skip_first_conv=True)
    )
    assert len(plan.compressed) == 2
    return dt.DeepTwist(model, plan, interval=INTERVAL)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def in_a_plain_loop(accumulate: int = 1) -> tuple[dt.DeepTwist, nn.Module]:
    """What every library below must come to."""
    model = network()
    twist, optimizer = twist_of(model), sgd(model)
    for _ in range(EPOCHS):
        for number, (x, y) in enumerate(loader(), start=1):
            (functional.cross_entropy(model(x), y) / accumulate).backward()
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                twist.step()
    return twist, twist.finish()


def check_same(twist: dt.DeepTwist, small: nn.Module | None, accumulate: int = 1) -> None:
    """The same distortions at the same steps, and the same low-rank network in the end."""
    expected, expected_small = in_a_plain_loop(accumulate)
    last = EPOCHS * IMAGES // BATCH // accumulate
    assert [x.step for x in twist.history] == [*range(INTERVAL, last + 1, INTERVAL), last]
    assert twist.history == expected.history
    assert small is not None
    assert sum(isinstance(module, FactoredLayer) for module in small.modules()) == 2
    # What the network weighs is of low rank: to decompose it again loses nothing.
    assert all(error < 1e-5 for error in errors(twist.model))
    check_equal(small, expected_small)


def check_equal(actual: nn.Module, expected: nn.Module) -> None:
    states = actual.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@torch.no_grad()
def check_own(small: nn.Module, model: nn.Module) -> None:
    """The decomposed model computes with its own weights, whatever happens to the dense ones."""
    for parameter in model.parameters():
        parameter.zero_()
    x = torch.randn(2, 1, 8, 8)
    assert model(x)["logits"].abs().max() == 0 < small(x)["logits"].abs().max()


def errors(model: nn.Module) -> list[float]:
    return [x.relative_error or 0.0 for x in twist_of(model).plan.compressed]


# A plain loop


@pytest.mark.parametrize("fused", [False, True])
def test_a_lower_scale_tells_the_steps_that_were_skipped(fused: bool) -> None:
    model = network()
    twist, optimizer = twist_of(model), torch.optim.Adam(model.parameters(), fused=fused)
    heard: list[None] = []
    after_each_step(twist, [optimizer], lambda: heard.append(None))
    scaler = torch.amp.GradScaler("cpu")
    told = 0
    for number, (x, y) in enumerate(loader()):
        exploding = torch.finfo(torch.float32).max if number in (2, 3, 6) else 1
        scaler.scale(functional.cross_entropy(model(x), y) * exploding).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        told += scaler.get_scale() >= scale
    taken = optimizer.state[model[0].weight]["step"]  # Adam counts for itself
    assert told == len(heard) == int(taken) == IMAGES // BATCH - 3


def test_only_the_optimizer_of_the_compressed_weights_counts(
    error_of: Callable[..., str],
) -> None:
    model = network()
    twist = twist_of(model)
    head, body, others = sgd(model[5]), sgd(model[3]), sgd(model[0])
    heard: list[None] = []
    handle = after_each_step(twist, [head, body, others], lambda: heard.append(None))
    for optimizer in (head, body, body, others):
        optimizer.step()
    assert len(heard) == 2
    handle.remove()
    body.step()
    assert len(heard) == 2
    assert "'3'" in error_of(after_each_step, twist, [others], heard.clear)


# Lightning


def fit(
    twist: dt.DeepTwist,
    folder: Path,
    epochs: int = EPOCHS,
    *,
    module: Callable[[nn.Module], Any] | None = None,
    resume: Path | None = None,
    **options: Any,
) -> Any:
    """Fits in Lightning; returns the callback, whose Trainer is its `trainer`."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from deeptwist.integrations.lightning import DeepTwistCallback

    callback = DeepTwistCallback(twist)
    callback.trainer = lightning.Trainer(  # type: ignore[attr-defined]
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=[callback, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        enable_model_summary=False,
        enable_progress_bar=False,
        **{"logger": False, **options},
    )
    fitted = (module or lightning_module)(twist.model)
    callback.trainer.fit(fitted, loader(), ckpt_path=resume)  # type: ignore[attr-defined]
    return callback


def lightning_module(model: nn.Module, optimizer: Callable[[nn.Module], Any] = sgd) -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optimizer(self.network)

    return Module()


@needs_lightning
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_comes_to_what_a_plain_loop_does(tmp_path: Path, accumulate: int) -> None:
    callback = fit(twist_of(network()), tmp_path, accumulate_grad_batches=accumulate)
    assert callback.twist.steps == callback.trainer.global_step
    check_same(callback.twist, callback.small, accumulate)


@needs_lightning
def test_a_resumed_fit_ends_as_one_that_was_never_interrupted(tmp_path: Path) -> None:
    fit(twist_of(network()), tmp_path, epochs=1)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    torch.load(checkpoint, weights_only=True)  # nothing of ours that has to be trusted
    callback = fit(twist_of(network()), tmp_path, resume=checkpoint)
    check_same(callback.twist, callback.small)


@needs_lightning
@pytest.mark.parametrize("fused", [False, True])
def test_lightning_does_not_count_steps_that_amp_skipped(tmp_path: Path, fused: bool) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    def module(model: nn.Module) -> Any:
        return lightning_module(model, lambda m: torch.optim.Adam(m.parameters(), fused=fused))

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # too large for fp16
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    callback = fit(twist_of(network()), tmp_path, module=module, plugins=[precision])
    (optimizer,) = callback.trainer.optimizers
    taken = int(optimizer.state[callback.twist.model[0].weight]["step"])
    assert 0 < taken < callback.trainer.global_step
    assert callback.twist.steps == taken


@needs_lightning
def test_lightning_with_several_optimizers(tmp_path: Path) -> None:
    """By hand, the head takes two steps for each of the convolutions; `global_step` counts all."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.body, self.head = model[:5], model[5]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            body, head = self.optimizers()  # type: ignore[attr-defined]
            for optimizers in ([body, head], [head]):
                loss = functional.cross_entropy(self.head(self.body(batch[0])), batch[1])
                self.zero_grad()
                self.manual_backward(loss)
                for optimizer in optimizers:
                    optimizer.step()

        def configure_optimizers(self) -> Any:
            return sgd(self.body), sgd(self.head)

    model = network()
    example = torch.zeros(2, 1, 8, 8)
    plan = dt.plan(
        model, dt.SVD(), ratio=2, example_input=example, layers=every_layer(include=["3"])
    )
    callback = fit(dt.DeepTwist(model, plan, interval=INTERVAL), tmp_path, module=Module)
    assert callback.trainer.global_step == 3 * callback.twist.steps
    assert callback.twist.steps == EPOCHS * IMAGES // BATCH


@needs_lightning
def test_lightning_logs_every_distortion(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    callback = fit(twist_of(network()), tmp_path, logger=logger)
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("weight_shift")
    logged = [float(row.split(",")[column]) for row in rows]
    assert logged == [record.weight_shift for record in callback.twist.history]


@needs_lightning
def test_lightning_with_the_twist_of_the_whole_module(tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return sgd(self)

    twist = twist_of(Module())
    callback = fit(twist, tmp_path, module=lambda model: model)
    check_equal(callback.small.network, in_a_plain_loop()[1])


@needs_lightning
def test_a_fit_that_fails_leaves_the_optimizer_alone(
    tmp_path: Path, error_of: Callable[..., str]
) -> None:
    twist, optimizers = twist_of(network()), []

    def module(model: nn.Module) -> Any:
        optimizers.append(torch.optim.SGD(model.parameters(), lr=1e30))
        return lightning_module(model, lambda _: optimizers[0])

    assert "NaN" in error_of(fit, twist, tmp_path, module=module)
    steps = twist.steps
    optimizers[0].step()
    assert twist.steps == steps > 0
    other = error_of(fit, twist, tmp_path, module=lambda _: lightning_module(network()))
    assert "no optimizer holds" in other


# Hugging Face's Trainer


class Classifier(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.network = model

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def trainer_of(model: nn.Module, twist: dt.DeepTwist, folder: Path, **options: Any) -> Any:
    """A Trainer and the callback in it; every epoch leaves a checkpoint."""
    from transformers import Trainer, TrainingArguments

    from deeptwist.integrations.transformers import DeepTwistCallback

    settings = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
        "save_strategy": "epoch",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    optimizer = options.pop("optimizer", sgd)
    callback = DeepTwistCallback(twist)
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **{**settings, **options}),
        train_dataset=[{"pixel_values": x, "labels": y} for x, y in data()],  # type: ignore[attr-defined]
        callbacks=[callback],
        optimizers=(optimizer(model), None),
    )
    return trainer, callback


@needs_transformers
@pytest.mark.parametrize("accumulate", [1, 2])
def test_hugging_face_comes_to_what_a_plain_loop_does(tmp_path: Path, accumulate: int) -> None:
    model = network()
    trainer, callback = trainer_of(
        Classifier(model), twist_of(model), tmp_path, gradient_accumulation_steps=accumulate
    )
    trainer.train()
    assert callback.twist.steps == trainer.state.global_step
    check_same(callback.twist, callback.small, accumulate)


@needs_transformers
def test_a_resumed_run_ends_as_one_that_was_never_interrupted(tmp_path: Path) -> None:
    model = network()
    trainer_of(Classifier(model), twist_of(model), tmp_path)[0].train()
    steps = IMAGES // BATCH
    model = network()
    trainer, callback = trainer_of(Classifier(model), twist_of(model), tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert trainer._initial_global_step == steps
    check_same(callback.twist, callback.small)


@needs_transformers
def test_a_checkpoint_of_dense_training_is_gone_on_from(tmp_path: Path) -> None:
    from deeptwist.integrations.transformers import DeepTwistCallback

    model = network()
    dense, _ = trainer_of(Classifier(model), twist_of(model), tmp_path)
    dense.remove_callback(DeepTwistCallback)
    dense.train()
    steps = IMAGES // BATCH
    trainer, callback = trainer_of(Classifier(model), twist_of(model), tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert [record.step for record in callback.twist.history] == [3, 6, 8]


@needs_transformers
@pytest.mark.parametrize("fused", [False, True])
def test_hugging_face_does_not_count_steps_that_amp_skipped(tmp_path: Path, fused: bool) -> None:
    class Exploding(Classifier):
        count = 0

        def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            outputs = super().forward(pixel_values, labels)
            self.count += 1
            if self.count in (2, 3, 6):
                outputs["loss"] = outputs["loss"] * torch.finfo(torch.float32).max
            return outputs

    model = network()
    trainer, callback = trainer_of(
        Exploding(model),
        twist_of(model),
        tmp_path,
        optimizer=lambda m: torch.optim.Adam(m.parameters(), fused=fused),
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # as for fp16, where there is a GPU
    trainer.train()
    assert callback.twist.steps == trainer.state.global_step - 3 == EPOCHS * IMAGES // BATCH - 3


@needs_transformers
def test_a_second_run_of_a_trainer_counts_each_step_once(tmp_path: Path) -> None:
    model = network()
    trainer, callback = trainer_of(Classifier(model), twist_of(model), tmp_path)
    steps = EPOCHS * IMAGES // BATCH
    for run in (1, 2):
        trainer.train()
        assert callback.twist.steps == run * steps
    trainer.optimizer.step()
    assert callback.twist.steps == 2 * steps


@needs_transformers
def test_a_hugging_face_model_under_mixed_precision(tmp_path: Path) -> None:
    """Accelerate replaces its forward by one bound to it; the decomposed copy has its own."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[16], depths=[2], num_labels=10)  # type: ignore[call-arg]
    )
    plan = dt.plan(
        model, dt.SpatialSVD(), ratio=2, example_input=torch.zeros(2, 1, 8, 8), layers=EVERY_LAYER
    )
    twist = dt.DeepTwist(model, plan, interval=INTERVAL)
    trainer, callback = trainer_of(model, twist, tmp_path, bf16=True)
    trainer.train()
    check_own(callback.small, model)
    trainer.train()


@needs_transformers
def test_hugging_face_may_not_replace_the_callback(
    tmp_path: Path, error_of: Callable[..., str]
) -> None:
    model = network()
    options = {"restore_callback_states_from_checkpoint": True}
    message = error_of(trainer_of, Classifier(model), twist_of(model), tmp_path, **options)
    assert "restore_callback_states_from_checkpoint" in message


# Accelerate


def accelerated(
    folder: Path, accumulate: int = 1, resume: Path | None = None
) -> tuple[dt.DeepTwist, nn.Module]:
    """The loop of the documentation; every epoch leaves a checkpoint."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    inner = network()
    model, optimizer, batches = accelerator.prepare(inner, sgd(inner), loader())
    twist = twist_of(accelerator.unwrap_model(model))
    accelerator.register_for_checkpointing(twist)
    if resume is not None:
        accelerator.load_state(resume)
    for epoch in range(0 if resume is None else 1, EPOCHS):
        for x, y in batches:
            with accelerator.accumulate(model):
                accelerator.backward(functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                twist.step()
        accelerator.save_state(folder / f"epoch-{epoch}")
    return twist, twist.finish()


@needs_accelerate
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_comes_to_what_a_plain_loop_does(tmp_path: Path, accumulate: int) -> None:
    check_same(*accelerated(tmp_path, accumulate), accumulate)


@needs_accelerate
def test_a_loaded_state_ends_as_a_loop_that_was_never_interrupted(tmp_path: Path) -> None:
    accelerated(tmp_path)
    check_same(*accelerated(tmp_path, resume=tmp_path / "epoch-0"))


@needs_accelerate
def test_accelerate_tells_the_steps_that_were_skipped() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")  # as for fp16, where there is a GPU
    inner = network()
    model, optimizer, batches = accelerator.prepare(
        inner, torch.optim.Adam(inner.parameters()), loader()
    )
    taken = 0
    for number, (x, y) in enumerate(batches):
        exploding = torch.finfo(torch.float32).max if number in (2, 3, 6) else 1
        accelerator.backward(functional.cross_entropy(model(x), y) * exploding)
        optimizer.step()
        optimizer.zero_grad()
        taken += not accelerator.optimizer_step_was_skipped
    assert taken == int(optimizer.state[inner[0].weight]["step"]) == IMAGES // BATCH - 3


@needs_accelerate
def test_the_copy_of_an_unwrapped_network_is_its_own_under_mixed_precision() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # another precision than before
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    inner = Classifier(network())
    example = torch.zeros(2, 1, 8, 8)
    plan = dt.plan(inner, dt.SVD(), ratio=2, example_input=example, layers=EVERY_LAYER)
    twist = dt.DeepTwist(inner, plan, interval=INTERVAL)
    model, _ = accelerator.prepare(inner, sgd(inner))
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    check_own(twist.finish(), inner)


# Packages and examples


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("lightning", "lightning.pytorch", "lightning"),
        ("transformers", "transformers", "transformers"),
    ],
)
def test_a_missing_package_is_told(
    module: str,
    package: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    error_of: Callable[..., str],
) -> None:
    name = f"deeptwist.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert f"'.[{extra}]'" in error_of(importlib.import_module, name)


@pytest.mark.slow
def run_example(path: Path, folder: Path) -> None:
    """Run a script as the main module of a process."""
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.argv = [str(path)]
    with Path("printed").open("w") as printed, redirect_stdout(printed):
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize(
    "example",
    [
        "plain_loop",
        pytest.param("lightning_trainer", marks=needs_lightning),
        # What these show of their libraries is tested above, batch by batch.
        pytest.param("huggingface_trainer", marks=[needs_transformers, pytest.mark.sweep]),
        pytest.param("accelerate_loop", marks=[needs_accelerate, pytest.mark.sweep]),
        pytest.param("timm_loop", marks=pytest.mark.sweep),
        pytest.param("segmentation", marks=pytest.mark.sweep),
        pytest.param("detection", marks=pytest.mark.sweep),
    ],
)
def test_an_example_runs(example: str, tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(
        target=run_example, args=(EXAMPLES / f"{example}.py", tmp_path)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    printed = (tmp_path / "printed").read_text()
    rows = dict(line.split(maxsplit=1) for line in printed.splitlines()[-3:])
    accuracies = {name: float(row.split("%")[0]) for name, row in rows.items()}
    assert accuracies["dense"] > {"segmentation": 75, "detection": 50}.get(example, 90)
    assert accuracies["DeepTwist"] > accuracies["untrained"]


@needs("ultralytics")
def test_yolo_is_trained_predicts_and_leaves_decomposed(tmp_path: Path) -> None:
    from ultralytics import YOLO

    yolo, x = YOLO("yolov8n.yaml"), torch.rand(2, 3, 64, 64)
    with pytest.raises(dt.DeepTwistError, match=r"give its \.model"):
        dt.plan(yolo, dt.SVD(), ratio=2, example_input=x)
    model = yolo.model.eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2)
    small = dt.decompose(model, dt.plan(model, dt.SpatialSVD(), ratio=2, example_input=x))
    expected = small(x)[0]
    folded = dt.fuse(small)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        for own in (folded, small.fuse(verbose=False), folded.fuse(verbose=False)):
            assert own is folded or own.is_fused()
            assert torch.allclose(own(x)[0], expected, rtol=1e-4, atol=1e-4)
    example = [sys.executable, EXAMPLES / "ultralytics_yolo.py"]
    environment = {**os.environ, "YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": str(tmp_path)}
    printed = subprocess.run(
        example, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
    ).stdout
    rows = {words[0]: words[1:] for line in printed.splitlines() if (words := line.split())}
    sizes = [int(rows[name][0].replace(",", "")) for name in ("dense", "fine-tuned", "DeepTwist")]
    assert sizes[1] < 0.55 * sizes[0]
    assert sizes[2] < 0.55 * sizes[0]
    assert rows["exported"] == ["best.onnx"]
    assert int(rows["DeepTwist"][-2]) > 1


@needs_lightning
def test_an_average_that_comes_too_late_is_refused() -> None:
    import lightning
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    from deeptwist.integrations.lightning import DeepTwistCallback

    module = lightning.LightningModule()
    for last in (True, False):
        callback = DeepTwistCallback(twist_of(model := network()))
        trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        pair = [StochasticWeightAveraging(0.1), callback]
        trainer.callbacks = pair if last else pair[::-1]  # type: ignore[attr-defined]
        trainer.strategy.optimizers = [sgd(model)]
        if last:
            callback.on_train_start(trainer, module)
        else:
            with pytest.raises(dt.DeepTwistError, match="list DeepTwistCallback after it"):
                callback.on_train_start(trainer, module)


class ScheduleFree(torch.optim.SGD):
    """Trains at points of its own, and puts the average in place where `eval` is called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1)
        self.param_groups[0]["train_mode"] = True

    @torch.no_grad()
    def eval(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.mul_(0.5)
        self.param_groups[0]["train_mode"] = False


def test_a_schedule_free_optimizer_puts_its_average_in_place() -> None:
    model = network()
    before = model[0].weight.detach().clone()
    optimizer = ScheduleFree(model)
    for _ in range(2):  # the second time there is nothing to do
        use_averages([optimizer, sgd(model)])
    assert torch.equal(model[0].weight, before * 0.5)


# --- from_pretrained


@needs_transformers
@pytest.mark.parametrize("method", [dt.SVD(), dt.TiledSVD(tile=(4, 18)), dt.Tucker()], ids=str)
def test_from_pretrained_makes_the_factored_layers(
    method: dt.Decomposition, tmp_path: Path
) -> None:
    """In transformers' own folder, and once more; the dense network's config says nothing."""
    from transformers import ResNetConfig, ResNetForImageClassification

    import deeptwist.integrations.transformers  # noqa: F401 (from_pretrained knows them then)

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
    dense = ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic")).eval()
    x = torch.randn(2, 3, 32, 32)
    small = dt.decompose(dense, dt.plan(dense, method, ratio=1.5, example_input=x))
    small.save_pretrained(tmp_path / "once")
    read = ResNetForImageClassification.from_pretrained(tmp_path / "once")
    read.save_pretrained(tmp_path / "twice")
    again = ResNetForImageClassification.from_pretrained(tmp_path / "twice")
    for model in (read, again):
        assert model.state_dict().keys() == small.state_dict().keys()
        torch.testing.assert_close(model(x).logits, small(x).logits)
        assert not model.is_quantized  # a Trainer would refuse to train it
    assert not hasattr(dense.config, "quantization_config")


def test_what_another_from_pretrained_does_not_make_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Hub(nn.Sequential):
        def save_pretrained(self, folder: Path) -> None:
            torch.save(self.state_dict(), folder / "model.pt")

    model, x = Hub(*network()), torch.randn(2, 1, 8, 8)
    dt.decompose(model, dt.plan(model, dt.SVD(), ratio=1.5, example_input=x))
    assert "from_pretrained does not make: use deeptwist.save and deeptwist.load" in caplog.text
