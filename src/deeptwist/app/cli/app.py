"""The application: its commands and where a recipe's values come from."""

from typing import Any

from cyclopts import App, ArgumentCollection, Parameter
from cyclopts.config import Dict

from deeptwist._version import __version__
from deeptwist.app.cli import commands
from deeptwist.app.training.recipe import read_values

# Where a trained network is at hand, a few gentle epochs of its factors cost least.
COMPRESS_DEFAULTS: dict[str, Any] = {
    "mode": "finetune",
    "optimizer": {"lr": 0.02},
    "calibration_images": 1024,
}

app = App(
    name="deeptwist",
    version=__version__,
    help_format="markdown",
    default_parameter=Parameter(negative=(), show_env_var=False),
    help="""Make a trained CNN smaller and faster by learning its low-rank approximation.

`deeptwist demo` shows all of it in two minutes.""",
)


def _values_of_recipe(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Let the recipe, or the network, that a command names fill in what is not written."""
    if commands not in (("train",), ("compress",)):
        return
    data, source = arguments["--data"], arguments["--data.source"]
    source.tokens += data.tokens  # the name of a section alone is its source
    data.tokens.clear()
    recipe = next((a.tokens[0].value for a in arguments if a.index == 0 and a.tokens), None)
    if recipe is None:
        return  # cyclopts says that it is missing
    is_file = recipe.endswith((".yaml", ".yml"))
    values: dict[str, Any] = read_values(recipe) if is_file else {"model": recipe}
    if not is_file and commands == ("compress",):
        values |= COMPRESS_DEFAULTS
    Dict(values, source=recipe, use_commands_as_keys=False)(app, commands, arguments)


app.config = (_values_of_recipe,)
for command in (
    commands.demo,
    commands.compress,
    commands.plan,
    commands.decompose,
    commands.train,
    commands.evaluate,
    commands.benchmark,
    commands.export,
    commands.report,
):
    app.command(command)
