"""The experiments, one file each, which reads as the paper's paragraph does."""

from experiments.paper.experiment import Experiment
from experiments.paper.experiments import (
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

from deeptwist.errors import unknown_name_error

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        fig2.EXPERIMENT,
        fig3.EXPERIMENT,
        fig4.EXPERIMENT,
        fig5.EXPERIMENT,
        table1.EXPERIMENT,
        fig6.EXPERIMENT,
        table2.EXPERIMENT,
        fig7.EXPERIMENT,
        interval.EXPERIMENT,
        noise.EXPERIMENT,
        tail.EXPERIMENT,
    )
}


def experiment_of(name: str) -> Experiment:
    """An experiment by name.

    Raises:
        DeepTwistError: if there is none of this name, with the nearest.
    """
    if name not in EXPERIMENTS:
        raise unknown_name_error("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]
