"""What an experiment is: the paper's place and claim, its cells, and how they are shown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deeptwist.reproduce.cells import Cell
from deeptwist.reproduce.findings import Findings, Finished
from deeptwist.reproduce.profiles import Network, Setting


@dataclass(frozen=True)
class Experiment:
    """A figure, a table or a statement of the paper.

    Attributes:
        name: on the command line.
        place: in the paper.
        claim: what is to be checked.
        network: that is trained; none where nothing is.
        cells: the trainings, in the order of what matters most.
        show: tables and figures of those that are finished.
    """

    name: str
    place: str
    claim: str
    network: Network | None
    cells: Callable[[Setting], Sequence[Cell]]
    show: Callable[[Finished, Setting], Findings]
