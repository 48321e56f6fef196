"""The whole job: calibrate, search a ratio, plan, decompose, train if asked, export, time, int8.

`compress` does it in one call over anyone's loop. Every step is a method of `Job` that keeps what
it makes and returns what it came to in plain values: who wants to show the steps, keep their
results, or skip those that are done calls them one by one, as the command line does.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deeptwist.decompose import decompose, recalibrate_batch_norm
from deeptwist.decompositions import Decomposition, SpatialSVD
from deeptwist.distill import distill
from deeptwist.errors import DeepTwistError, explaining, unknown_name_error
from deeptwist.export import export_onnx, quantize_onnx
from deeptwist.files import write_text
from deeptwist.inspection.run import ExampleInput, Inputs, read_batches
from deeptwist.measure.machine import describe_machine
from deeptwist.measure.runtimes import OnnxNetwork, Run, Setting, make_runner
from deeptwist.measure.timing import Comparison, time_interleaved, time_settings
from deeptwist.plan.calibration import Calibration, calibrate
from deeptwist.plan.plan import Plan, read_plan
from deeptwist.plan.planner import plan
from deeptwist.save import load, save
from deeptwist.search import RATIOS, most_scores, search_ratio

CALIBRATION, PLAN, SMALL = "calibration.safetensors", "plan.json", "model"  # in a job's folder
DISTILLING, DISTILLED = "distilling.pt", "distilled"
SIZES = "ratio", "weights", "macs", "latency"  # arguments of `plan` that say how small
FIND = "macs"  # of these, where a goal is given

Values = dict[str, Any]  # what a step came to, as JSON holds it
Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
Table = list[list[str]]


def no_progress(label: str, total: int) -> AbstractContextManager[Callable[[], None]]:
    """Show nothing; see `Job.progress`."""
    return nullcontext(lambda: None)


@dataclass(frozen=True)
class Compressed:
    """A network made smaller; printed, a table of what it was and what it is.

    Attributes:
        model: the small one.
        plan: what was done to each layer.
        before: what `eval_fn` said of the dense network.
        after: what it says of the small one.
    """

    model: nn.Module
    plan: Plan
    before: float
    after: float

    def __str__(self) -> str:
        change = f"{self.after - self.before:+.4f}".replace("-", "−")
        score = ["score", f"{self.before:.4f}", f"{self.after:.4f}", change]
        table = [["", "dense", "small", ""], score, *size_rows(_sizes(self.plan))]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = (
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in table
        )
        return "\n".join(line.rstrip() for line in lines)


def compress(
    model: nn.Module,
    train_loader: Iterable[Any],
    eval_fn: Callable[[nn.Module], float],
    *,
    goal: float | None = None,
    find: str = FIND,
    distill_steps: int = 0,
    train_fn: Callable[[nn.Module], object] | None = None,
    calibration_batches: int = 8,
    inputs: Callable[[Any], ExampleInput] | None = None,
    **options: Any,
) -> Compressed:
    """Make a trained network smaller and tell what it cost; the network itself stays as it is.

    Args:
        model: any trained network, for any task.
        train_loader: batches to calibrate on, and to take batch norm's statistics from.
        eval_fn: a network → its score, the higher the better.
        goal: the least score, instead of a size: the smallest network that keeps it is searched.
        find: what a goal finds the largest of: `"ratio"`, `"weights"`, `"macs"` or `"latency"`.
        distill_steps: in which the decomposed network learns from the dense one, on the loader's
            batches without their labels, see `deeptwist.distill`; 0 for none.
        train_fn: trains the decomposed network in place, in your own loop; none for no training.
        calibration_batches: that many of the loader's.
        inputs: a batch → what the network is called with, see `deeptwist.calibrate`.
        options: of `deeptwist.plan`: `decomposition` (`SpatialSVD` without it), `ratio`, `macs`, …

    Raises:
        DeepTwistError: if nothing says how small, before any work is done; if the goal cannot be
            kept; or if one of the steps fails.
    """
    options = {"decomposition": SpatialSVD(), **options}
    _check_size(options, goal, find)
    device = next(model.parameters()).device
    taken = [*islice(train_loader, calibration_batches)]
    batches = [*read_batches(taken, inputs, device)]
    options["example_input"] = batches[0]

    def make_plan(calibration: Calibration | None, ratio: float | None) -> Plan:
        asked = options if ratio is None else {**options, find: ratio}
        return plan(model, calibration=calibration, **asked)

    if distill_steps and isinstance(train_loader, Iterator):  # some of its batches are taken
        train_loader = [*taken, *train_loader]

    def recover(network: nn.Module, learns: bool) -> nn.Module:
        network = recalibrate_batch_norm(network, batches)
        if not learns:
            return network
        # Judged by what it learned, not by whether that is nearer to the dense network.
        return distill(network, model, train_loader, steps=distill_steps, held_out=0, inputs=inputs)

    job = Job(model, make_plan, batches=lambda: batches, recover=recover)
    before, has_learned = eval_fn(model), False
    with explaining("eval_fn gives no number", "let it return the score", (TypeError, ValueError)):
        float(before)
    job.calibrate()
    if goal is None:
        job.choose_plan()
    else:
        search = job.search(eval_fn, goal, learns=distill_steps > 0)
        if not search["kept"]:
            raise DeepTwistError(f"no factor of {find} from {RATIOS[0]} on keeps a score of {goal}")
        has_learned = search["learned"]
    if not has_learned:
        job.decompose()
        if distill_steps:
            job.distill(train_loader, inputs, steps=distill_steps)
    if train_fn is not None:
        train_fn(job.small)
    return Compressed(job.small, job.plan, before, eval_fn(job.small))


@dataclass(eq=False)
class Job:
    """A network on its way to a smaller one.

    What the steps make is `calibration`, `plan` and `small`. With a folder they are kept there
    too, and read from it where the step that made them was an earlier process's.

    Attributes:
        model: the dense network; left as it is.
        make_plan: a calibration, or none, and a ratio in place of the size asked for → the plan.
        batches: gives the inputs to calibrate on, a batch at a time.
        recover: what every decomposed network goes through before it is evaluated or trained:
            batch norm's statistics anew, say; and, where it learns in a search, that.
        folder: of the job; none to keep things in memory.
        progress: a label and a number of rounds → shows them; gives the call that tells of one.
        metadata: what the ONNX files are to say of their network, see `deeptwist.save`.
    """

    model: nn.Module
    make_plan: Callable[[Calibration | None, float | None], Plan]
    batches: Callable[[], Iterable[Inputs | Tensor]]
    recover: Callable[[nn.Module, bool], nn.Module] = lambda network, learns: network
    folder: Path | None = None
    progress: Progress = no_progress
    metadata: Values | None = None

    @cached_property
    def calibration(self) -> Calibration | None:
        """What `calibrate` gave; `None` where that was left out."""
        path = None if self.folder is None else self.folder / CALIBRATION
        return Calibration.load(path) if path is not None and path.exists() else None

    @cached_property
    def plan(self) -> Plan:
        """What is done to each layer."""
        return read_plan(self._file(PLAN))

    @cached_property
    def small(self) -> nn.Module:
        """The small network as the last step left it, on the dense one's device."""
        return self.read_small()

    def read_small(self) -> nn.Module:
        """Read the small network that is in the folder, onto the dense one's device."""
        device = next(self.model.parameters()).device
        return load(self._file(SMALL), model=self.model).to(device)

    def calibrate(self) -> Values:
        """Gather what the layers see of the batches."""
        self.calibration = calibrate(self.model, self.batches())
        if self.folder is not None:
            self.calibration.save(self.folder / CALIBRATION)
        return {"layers": len(self.calibration.moments)}

    def search(
        self, score: Callable[[nn.Module], float], least: float, *, learns: bool = False
    ) -> Values:
        """Choose the plan of the largest ratio that keeps a score, without labels.

        Where its network learned to, that is the small one.

        Args:
            score: a network → its score, the higher the better.
            least: the goal.
            learns: whether the one chosen will learn from the dense network, see `search_ratio`.

        Returns:
            Whether any ratio keeps it, the largest that does or else the smallest there is, whether
            its network has learned, and all that were tried: the ratio, the score, and whether that
            one had learned.
        """
        tried: list[list[float]] = []
        plans: dict[float, Plan] = {}
        learned: dict[float, nn.Module] = {}  # the largest that keeps the score, of those that did

        def score_of(ratio: float, learns: bool) -> float:
            value = -math.inf
            if ratio not in plans:
                with suppress(DeepTwistError):  # more than the layers can save
                    plans[ratio] = self._plan(ratio)
            if ratio in plans:
                network = self.make_small(plans[ratio], learns)
                value = score(network)
                tried.append([ratio, value, learns])
                if learns and value >= least:
                    learned.clear()
                    learned[ratio] = network
            advance()
            return value

        with self.progress("search", most_scores(learns=learns)) as advance:
            found = search_ratio(score_of, least, learns=learns)
        ratio = found or RATIOS[0]
        self._keep(plans.get(ratio) or self._plan(ratio))
        if ratio in learned:
            self._keep_distilled(learned[ratio])
        return {
            "least": least,
            "kept": found is not None,
            "ratio": ratio,
            "learned": ratio in learned,
            "tried": tried,
        }

    def choose_plan(self) -> Values:
        """Plan as asked.

        Raises:
            DeepTwistError: if the plan compresses no layer.
        """
        self._keep(self._plan(None))
        return self.describe_plan()

    def describe_plan(self) -> Values:
        """Return what the plan that was chosen comes to."""
        promise = None if self.plan.latency is None else str(self.plan.latency)
        return {"layers": len(self.plan.compressed), **_sizes(self.plan), "promise": promise}

    def make_small(self, plan: Plan, learns: bool = False) -> nn.Module:
        """Return the network of a plan, decomposed and recovered, see `recover`; not trained."""
        return self.recover(decompose(self.model, plan, calibration=self.calibration), learns)

    def decompose(self) -> nn.Module:
        """Decompose as planned: the small network is there, to be trained in place or as it is."""
        self.small = self.make_small(self.plan)
        return self.small

    def distill(
        self,
        batches: Iterable[Any],
        inputs: Callable[[Any], ExampleInput] | None = None,
        *,
        steps: int,
        minutes: float | None = None,
    ) -> Values:
        """Have the small network learn from the dense one; see `deeptwist.distill`."""
        done = 0

        def on_step() -> None:
            nonlocal done
            done += 1
            advance()

        limit = "" if minutes is None else f", {minutes:g} minutes at most"
        with self.progress(f"distill{limit}", steps) as advance:
            distilled = distill(
                self.small,
                self.model,
                batches,
                steps=steps,
                minutes=minutes,
                inputs=inputs,
                on_step=on_step,
                checkpoint=None if self.folder is None else self.folder / DISTILLING,
            )
        self._keep_distilled(distilled)
        return {"steps": done}

    def export(self, example_input: Tensor) -> Values:
        """Write both networks as verified ONNX files of a free batch."""
        written = {
            name: export_onnx(
                network, self._file(f"{name}.onnx"), example_input, metadata=self.metadata
            )
            for name, network in (("dense", self.model), ("small", self.small))
        }
        worst = max(file.worst_difference or 0.0 for file in written.values())
        return {"difference": worst, **{name: file.bytes for name, file in written.items()}}

    def time(
        self, example_input: Callable[[int], Tensor], settings: Sequence[Setting], rounds: int
    ) -> Values:
        """Time both networks in turn, in every setting.

        With a folder, onnxruntime runs what `export` wrote.
        """
        networks = {"dense": self.model, "small": self.small}

        def make_runners(setting: Setting) -> list[Run]:
            x = example_input(setting.batch)
            if setting.runtime != "onnxruntime" or self.folder is None:
                return [make_runner(network, x, setting) for network in networks.values()]
            files = [self._file(f"{name}.onnx") for name in networks]
            return [OnnxNetwork(file, setting.threads).make_runner(x) for file in files]

        with self.progress("time", len(settings) * rounds) as advance:
            timed = time_settings(make_runners, settings, rounds=rounds, on_round=advance)
            rows = [
                {**asdict(setting), "times": None, "reason": times}
                if isinstance(times, str)
                else {**asdict(setting), "times": asdict(times)}
                for setting, times in timed
            ]
        return {"machine": describe_machine(), "settings": rows}

    def int8(
        self,
        evaluate: Callable[[nn.Module], Values],
        batches: Callable[[], Iterable[Tensor]],
        example_input: Tensor,
        *,
        threads: int,
        rounds: int,
    ) -> Values:
        """Quantise what `export` wrote, evaluate it and time it.

        Args:
            evaluate: a network → what its evaluation came to.
            batches: gives the inputs whose activations' ranges are taken.
            example_input: to time on.
            threads: of the processor.
            rounds: samples of each network.
        """
        values, runs = {}, []
        for name in ("dense", "small"):
            path = self._file(f"{name}-int8.onnx")
            quantize_onnx(self._file(f"{name}.onnx"), path, batches())
            network = OnnxNetwork(path, threads)
            values[name] = {**evaluate(network), "bytes": path.stat().st_size}
            runs.append(network.make_runner(example_input))
        dense, small = time_interleaved(runs, rounds=rounds)
        times = Comparison.of(dense, small)
        return {**values, "batch": len(example_input), "times": asdict(times)}

    def _plan(self, ratio: float | None) -> Plan:
        plan = self.make_plan(self.calibration, ratio)
        if not plan.compressed:
            raise DeepTwistError("the plan compresses no layer: 'deeptwist plan' shows the reasons")
        return plan

    def _keep(self, plan: Plan) -> None:
        self.plan = plan
        if self.folder is not None:
            write_text(self.folder / PLAN, plan.to_json())

    def _keep_distilled(self, small: nn.Module) -> None:
        self.small = small
        if self.folder is not None:
            save(small, self.folder / DISTILLED)

    def _file(self, name: str) -> Path:
        if self.folder is None:
            raise DeepTwistError(f"a job without a folder has no {name}")
        return self.folder / name


def size_rows(sizes: Values) -> Table:
    """Return the rows of a table that tell a plan's weights and MACs, before and after."""
    return [
        count_row(label, sizes[f"dense_{name}"], sizes[name])
        for name, label in (("parameters", "weights"), ("macs", "MACs"))
    ]


def count_row(label: str, dense: int, small: int) -> list[str]:
    """Return a row that tells a count before and after, and how many times fewer."""
    return [label, f"{dense:,}", f"{small:,}", f"{dense / max(1, small):.2f}× fewer"]


def _sizes(plan: Plan) -> Values:
    names = "dense_parameters", "parameters", "dense_macs", "macs"
    return {name: getattr(plan, name) for name in names}


def _check_size(options: Values, goal: float | None, find: str) -> None:
    """Check, before any work, the options' names, and that something says how small."""
    known = inspect.signature(plan).parameters
    for name in options.keys() - known:
        raise unknown_name_error("option", name, known)
    if find not in SIZES:
        raise unknown_name_error("size to find", find, SIZES)
    given = [name for name in SIZES if options.get(name) is not None]
    if goal is not None and given:
        raise DeepTwistError(f"a goal finds the size: leave out {', '.join(given)}")
    methods = options["decomposition"]
    methods = [methods] if isinstance(methods, Decomposition | str) else methods
    is_open = any(isinstance(method, str) or method.needs_ratio for method in methods)
    if goal is None and not given and is_open:
        raise DeepTwistError("say how small: ratio=4, weights=4, macs=3, latency=2, or goal=0.9")
