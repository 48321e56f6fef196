"""Two whole networks, dense and decomposed, in every setting that was asked for."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from deeptwist.errors import DeepTwistError
from deeptwist.inspection.run import eval_mode
from deeptwist.measure.comparison import Comparison, compare_functions
from deeptwist.measure.memory import peak_memory
from deeptwist.measure.runtimes import DType, Runtime, prepare


@dataclass(frozen=True)
class Setting:
    """What a network is run with."""

    batch: int
    threads: int
    dtype: DType = "float32"
    runtime: Runtime = "eager"


@dataclass(frozen=True)
class Measurement:
    """Both networks in one setting.

    Attributes:
        setting: what they ran with.
        times: measured, in turn; none where the setting is not to be had.
        reason: why it is not.
    """

    setting: Setting
    times: Comparison | None
    reason: str | None = None


@dataclass(frozen=True)
class PeakMemory:
    """Bytes above the weights that one forward pass takes at its peak, input not counted."""

    dense: int
    decomposed: int


def settings_of(
    batches: Sequence[int],
    threads: Sequence[int],
    dtypes: Sequence[DType],
    runtimes: Sequence[Runtime],
) -> list[Setting]:
    """Every combination, the batch changing fastest."""
    return [
        Setting(batch, count, dtype, runtime)
        for runtime, dtype, count, batch in product(runtimes, dtypes, threads, batches)
    ]


def measure(
    dense: nn.Module,
    decomposed: nn.Module,
    example_input: Callable[[int], Tensor],
    settings: Iterable[Setting],
    *,
    rounds: int = 15,
    on_round: Callable[[], None] = lambda: None,
) -> Iterator[Measurement]:
    """Times both networks in one setting after the other.

    Args:
        dense: one network.
        decomposed: the other.
        example_input: gives an input of so many examples, on the networks' device.
        settings: what to run with.
        rounds: samples of each network in each setting, two at least.
        on_round: called after every round.
    """
    before = torch.get_num_threads()
    try:
        for setting in settings:
            x = _channels_last(example_input(setting.batch))
            options = {"runtime": setting.runtime, "dtype": setting.dtype}
            if setting.runtime == "compile":
                torch.compiler.reset()  # compiled code is bound to the number of threads
            try:
                runs = [
                    prepare(model, x, threads=setting.threads, **options)  # type: ignore[arg-type]
                    for model in (dense, decomposed)
                ]
            except DeepTwistError as error:
                yield Measurement(setting, None, str(error))
                continue
            yield Measurement(setting, compare_functions(*runs, rounds=rounds, on_round=on_round))
    finally:
        torch.set_num_threads(before)


def measure_memory(dense: nn.Module, decomposed: nn.Module, x: Tensor) -> PeakMemory:
    """The peak memory of a forward pass of both, in evaluation mode without gradients."""
    x = _channels_last(x)
    with eval_mode(dense), eval_mode(decomposed), torch.inference_mode():
        peaks = []
        for model in (dense, decomposed):
            model(x)  # what is made once is made now
            peaks.append(peak_memory(partial(model, x)))
    return PeakMemory(*peaks)


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
