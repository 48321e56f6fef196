"""``python -m experiments.paper``: run an experiment of the paper."""

from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

from cyclopts import App, Parameter
from experiments.paper.runner import Options, Runner

from deeptwist.app import cli
from deeptwist.app.cli.console import progress_bar
from deeptwist.errors import DeepTwistError, unknown_name_error

_NAMES = "fig2 fig3 fig4 fig5 table1 fig6 table2 fig7 interval noise tail long"
EXPERIMENTS = {name: import_module(f"experiments.paper.{name}") for name in _NAMES.split()}
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
    options: Annotated[Options | None, Parameter(name="*")] = None,
) -> None:
    """Run an experiment of the paper; write its table and figures beside the paper's numbers.

    Args:
        name: One that --list names.
        list_: Show all experiments.
        options: What is asked of it.
    """
    if list_:
        for each, module in EXPERIMENTS.items():
            count = len(Runner(each, module).recipes)
            size = f"{count} run{'s' * (count > 1)}" if count else "exact"
            print(f"{each:8}  {module.PLACE:18}  {size:7}  {module.CLAIM}")
        return
    if name is None:
        raise DeepTwistError("name an experiment: 'python -m experiments.paper --list' shows them")
    if name not in EXPERIMENTS:
        raise unknown_name_error("experiment", name, EXPERIMENTS)
    print(Runner(name, EXPERIMENTS[name], options or Options()).run(progress_bar))


def main(words: Sequence[str] | None = None) -> None:
    """Run an experiment; bad input ends with one line and exit code 2."""
    cli.run(app, words)


if __name__ == "__main__":
    main()
