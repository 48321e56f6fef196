"""``python -m experiments.paper``: run an experiment of the paper."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from experiments.paper import long
from experiments.paper.experiments import EXPERIMENTS, experiment_of
from experiments.paper.job import Request, reproduce
from experiments.paper.profiles import ProfileName

from deeptwist import cli
from deeptwist.cli.console import progress_bar
from deeptwist.cli.options import Several
from deeptwist.errors import DeepTwistError

app = App(
    name="python -m experiments.paper",
    help_format="markdown",
    default_parameter=Parameter(negative=(), show_env_var=False),
)


@app.default
def experiment(
    name: str | None = None,
    *,
    list_: Annotated[bool, Parameter("--list")] = False,
    profile: ProfileName = "short",
    data: str | None = None,
    weights: Path | None = None,
    out: Path = Path("results"),
    runs: Path = Path("runs/reproduce"),
    seeds: Several[int] = (0,),
    only: Several[str] = (),
    draw_only: Annotated[bool, Parameter(("--show", "--draw-only"))] = False,
) -> None:
    """Run an experiment of the paper; write its table and figures beside the paper's numbers.

    Args:
        name: One that --list names.
        list_: Show all experiments.
        profile: The paper's schedule, a short one, or a smoke test.
        data: digits, cifar10, or a folder with train/ and test/ (or val/) of class folders.
        weights: A checkpoint of the network to start from.
        out: Folder of the results.
        runs: Folder of the runs, which experiments share; finished ones are read.
        seeds: Train each cell once with each.
        only: Train only cells of these names or globs.
        draw_only: Train nothing; draw what is finished.
    """
    if name == "long":
        print(long.show(out))
        return
    if list_:
        for listed in EXPERIMENTS.values():
            count = len(listed.cells_of("short"))
            size = f"{count} run{'s' * (count > 1)}" if count else "exact"
            print(f"{listed.name:8}  {listed.place:18}  {size:7}  {listed.claim}")
        return
    if name is None:
        raise DeepTwistError("name an experiment: 'python -m experiments.paper --list' shows them")
    request = Request(
        profile=profile,
        data=data,
        weights=weights,
        out=out,
        runs=runs,
        seeds=seeds,
        only=only,
        draw_only=draw_only,
    )
    print(reproduce(experiment_of(name), request, progress=progress_bar))


def main(words: Sequence[str] | None = None) -> None:
    """Run an experiment; bad input ends with one line and exit code 2."""
    cli.run(app, words)


if __name__ == "__main__":
    main()
