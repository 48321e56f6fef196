# The public names: what type checkers, editors and, at run time, `__init__.py` read.

from deeptwist._version import __version__ as __version__
from deeptwist.compress import compress as compress
from deeptwist.decompose import decompose as decompose
from deeptwist.decompose import recalibrate_batch_norm as recalibrate_batch_norm
from deeptwist.decompositions import CP as CP
from deeptwist.decompositions import SVD as SVD
from deeptwist.decompositions import Decomposition as Decomposition
from deeptwist.decompositions import SpatialSVD as SpatialSVD
from deeptwist.decompositions import TiledSVD as TiledSVD
from deeptwist.decompositions import Tucker as Tucker
from deeptwist.distill import distill as distill
from deeptwist.errors import DeepTwistError as DeepTwistError
from deeptwist.inspection.fuse import fuse as fuse
from deeptwist.plan.calibration import Calibration as Calibration
from deeptwist.plan.calibration import calibrate as calibrate
from deeptwist.plan.latency import Latency as Latency
from deeptwist.plan.latency import exclude_slow_layers as exclude_slow_layers
from deeptwist.plan.layers import Layers as Layers
from deeptwist.plan.plan import Plan as Plan
from deeptwist.plan.planner import plan as plan
from deeptwist.precondition import precondition as precondition
from deeptwist.save import load as load
from deeptwist.save import save as save
from deeptwist.twist import DeepTwist as DeepTwist

__all__: list[str]
