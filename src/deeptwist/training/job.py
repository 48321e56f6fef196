"""The whole job: train in one of the modes, evaluate what is deployed, keep it with its records."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from deeptwist._version import __version__
from deeptwist.artefact import WEIGHTS, save
from deeptwist.benchmark.comparison import compare
from deeptwist.data import Dataset, normalize
from deeptwist.distortion import DeepTwist
from deeptwist.errors import DeepTwistError
from deeptwist.factorization import decompose
from deeptwist.files import replacing, write_text
from deeptwist.machine import describe_machine
from deeptwist.planning import Plan
from deeptwist.training import records
from deeptwist.training.evaluation import Evaluation, evaluate
from deeptwist.training.loop import Epoch, Record, fit
from deeptwist.training.records import Summary
from deeptwist.training.settings import Mode, Settings


def run(
    model: nn.Module,
    data: Dataset,
    settings: Settings,
    folder: Path,
    *,
    mode: Mode,
    plan: Plan,
    decomposition: str | None = None,
    ratio: float | None = None,
    name: str,
    model_name: str,
    latency_batch: int | None = 16,
    on_record: Callable[[Record], None] = lambda record: None,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[nn.Module, Summary]:
    """Trains a model, evaluates what would be deployed, and writes the run's folder.

    Modes: ``"dense"`` trains the model as it is; ``"deeptwist"`` distorts it while it trains and
    decomposes it at the end; ``"decomposed"`` decomposes it first and trains the factors, which
    is conventional fine-tuning. All see the same images in the same order.

    Args:
        model: changed in place by the first two modes.
        data: see `data.load_data`.
        settings: see `Settings`.
        folder: where the run is written; it must not hold a run yet.
        mode: see above.
        plan: of the model; a dense run reads only its costs.
        decomposition: as asked for, for the record.
        ratio: as asked for, for the record.
        name: of the run, for the record.
        model_name: for the record and the artefact.
        latency_batch: images in the batch that latency is measured on; none to leave it out.
        on_record: called with every epoch's and every distortion's record.
        on_step: called after every optimizer step.

    Returns:
        The model to deploy, and the run's summary.

    Raises:
        DeepTwistError: if the folder holds a run, or training fails.
    """
    _claim(folder)
    started = time.perf_counter()
    metrics = folder / records.METRICS
    steps = 0

    def record(entry: Record) -> None:
        nonlocal steps
        steps = max(steps, entry.step)
        event = "epoch" if isinstance(entry, Epoch) else "distortion"
        records.append(metrics, event, asdict(entry))
        on_record(entry)

    test = data.test.images, data.test.labels, data
    before = evaluate(model, *test)
    untrained: Evaluation | None = None
    output_difference = None
    if mode == "dense":
        fit(model, data, settings, on_record=record, on_step=on_step)
        final = model
    else:
        write_text(folder / records.PLAN, plan.to_json())
        final = decompose(model, plan)
        untrained = evaluate(final, *test)
        if mode == "decomposed":
            fit(final, data, settings, on_record=record, on_step=on_step)
        else:
            example = normalize(data.test.images[:8], data.mean, data.std)
            example = example.to(next(model.parameters()).device)
            twist = DeepTwist(model, plan, settings.interval, example_input=example)
            fit(model, data, settings, twist=twist, on_record=record, on_step=on_step)
            final = twist.finish()
            record(twist.records[-1])
            output_difference = twist.output_difference
    after = evaluate(final, *test)
    weights = _write_model(final, folder, mode, model_name)
    latency = None
    if mode != "dense" and latency_batch is not None:
        x = normalize(data.test.images[:latency_batch], data.mean, data.std)
        x = x.to(next(model.parameters()).device, memory_format=torch.channels_last)
        latency = compare(model, final, x)
    dense = mode == "dense"
    summary = Summary(
        name=name,
        mode=mode,
        model=model_name,
        data=data.name,
        decomposition=None if dense else decomposition,
        ratio=None if dense else ratio,
        accuracy_before=before.accuracy,
        accuracy_untrained=None if untrained is None else untrained.accuracy,
        accuracy=after.accuracy,
        loss=after.loss,
        parameters_before=plan.dense_parameters,
        parameters=sum(parameter.numel() for parameter in final.parameters()),
        macs_before=plan.dense_macs,
        macs=plan.dense_macs if dense else plan.macs,
        bytes=weights.stat().st_size,
        steps=steps,
        seconds=time.perf_counter() - started,
        output_difference=output_difference,
        latency=latency,
        latency_batch=None if latency is None else latency_batch,
        settings=asdict(settings),
        machine=describe_machine(),
        version=__version__,
    )
    summary.write(folder)
    return final, summary


def _claim(folder: Path) -> None:
    if (folder / records.SUMMARY).exists():
        raise DeepTwistError(f"{folder} holds a finished run: choose another folder or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / records.METRICS).write_text("", encoding="utf-8")
    except OSError as error:
        raise DeepTwistError(f"cannot write {folder}: {error.strerror}") from None


def _write_model(model: nn.Module, folder: Path, mode: Mode, model_name: str) -> Path:
    if mode != "dense":
        return save(model, folder / records.ARTEFACT, base_model=model_name) / WEIGHTS
    path = folder / records.DENSE_WEIGHTS
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary)
    return path
