"""deeptwist: make a trained CNN smaller and faster by learning its low-rank approximation.

After 'Learning Low-Rank Approximation for CNNs' (Lee, Kwon, Kim, Wei; arXiv 1905.10145).
"""

from deeptwist._version import __version__ as __version__
from deeptwist.artefact import load as load
from deeptwist.artefact import save as save
from deeptwist.decompositions import CP as CP
from deeptwist.decompositions import SVD as SVD
from deeptwist.decompositions import SpatialSVD as SpatialSVD
from deeptwist.decompositions import TiledSVD as TiledSVD
from deeptwist.decompositions import Tucker as Tucker
from deeptwist.distortion import DeepTwist as DeepTwist
from deeptwist.errors import DeepTwistError as DeepTwistError
from deeptwist.factorization import decompose as decompose
from deeptwist.planning import Plan as Plan
from deeptwist.planning import plan as plan
