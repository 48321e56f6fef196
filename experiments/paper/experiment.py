"""What an experiment is: the paper's place and claim, its cells, and how they are shown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.paper.cells import Cell
from experiments.paper.findings import Findings, Finished
from experiments.paper.profiles import Network, ProfileName, Setting, setting_of


@dataclass(frozen=True)
class Experiment:
    """A figure, a table or a statement of the paper.

    Attributes:
        name: on the command line.
        place: in the paper.
        claim: what is to be checked.
        network: that cells train.
        cells: the trainings, in the order of what matters most.
        show: tables and figures of those that are finished.
    """

    name: str
    place: str
    claim: str
    network: Network
    cells: Callable[[Setting], Sequence[Cell]]
    show: Callable[[Finished, Setting], Findings]

    def cells_of(self, profile: ProfileName) -> Sequence[Cell]:
        """The cells in a profile."""
        return self.cells(setting_of(profile, self.network))
