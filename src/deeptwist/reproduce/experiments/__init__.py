"""The experiments, one file each, which reads as the paper's paragraph does."""

from deeptwist.errors import unknown
from deeptwist.reproduce.experiment import Experiment
from deeptwist.reproduce.experiments import (
    fig2,
    fig3,
    fig4,
    fig5,
    fig6,
    fig7,
    interval,
    noise,
    table1,
    table2,
    tail,
)

EXPERIMENTS = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (fig2, fig3, fig4, fig5, table1, fig6, table2, fig7, interval, noise, tail)
}


def experiment_of(name: str) -> Experiment:
    """An experiment by name.

    Raises:
        DeepTwistError: if there is none of this name, with the nearest.
    """
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]
