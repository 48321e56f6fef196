"""What one layer loses at any rank: every method's spectrum is taken once."""

from torch import Tensor

from deeptwist.decompositions import Decomposition
from deeptwist.decompositions.linalg import relative_error
from deeptwist.errors import DeepTwistError
from deeptwist.inspection.usage import Layer
from deeptwist.layers.geometry import ConvGeometry, weight_to_kernel
from deeptwist.layers.moments import SecondMoment
from deeptwist.plan.calibration import to_device


class LayerErrors:
    """The relative errors of one layer's approximations.

    Attributes:
        layer: see `Layer`.
    """

    def __init__(self, layer: Layer, moment: SecondMoment | None) -> None:
        """Read nothing yet; `moment` is that of the layer's inputs."""
        self.layer = layer
        self._moment = moment
        self._spectra: dict[Decomposition, Tensor | None] = {}

    def error(self, geometry: ConvGeometry, decomposition: Decomposition) -> float | None:
        """Return ‖W − W′‖_F / ‖W‖_F, or the outputs' where there is a moment.

        Args:
            geometry: the layer's geometry.
            decomposition: with its rank set.

        Returns:
            The error, as `Decomposition.errors_at_all_ranks` tells it; `None` on the meta device.

        Raises:
            DeepTwistError: if a weight is not finite, naming the layer.
        """
        method, rank = decomposition.without_rank(), decomposition.rank
        if method not in self._spectra:
            kernel = self._kernel(geometry)
            if kernel.is_meta:
                return None
            if not kernel.isfinite().all():
                name = self.layer.names[0]
                raise DeepTwistError(f"layer {name!r} has weights that are NaN or infinite")
            self._moment = to_device(self._moment, kernel)
            spectrum = method.errors_at_all_ranks(kernel, self._moment)
            self._spectra[method] = None if spectrum is None else spectrum.cpu()
        errors = self._spectra[method]
        if errors is None or rank is None:
            return self._measure(self._kernel(geometry), decomposition)
        ranks = rank if isinstance(rank, tuple) else (rank,)
        return float(errors[tuple(r - 1 for r in ranks)])

    def _kernel(self, geometry: ConvGeometry) -> Tensor:
        if self.layer.weight is None:
            raise DeepTwistError(f"layer {self.layer.names[0]!r} {self.layer.reason}")
        return weight_to_kernel(self.layer.weight.read(), geometry)

    def _measure(self, kernel: Tensor, decomposition: Decomposition) -> float:
        """Decompose, where a method has no spectrum."""
        factors = decomposition.decompose(kernel, second_moment=self._moment)
        approximation = factors.reconstruct()
        if self._moment is not None:
            return self._moment.relative_error(kernel, approximation)
        return relative_error(kernel, approximation)
