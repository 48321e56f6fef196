"""The paper's networks, networks by name, and weights for them."""

from deeptwist.app.models.checkpoint import load_weights
from deeptwist.app.models.zoo import MODELS, build_model

__all__ = ["MODELS", "build_model", "load_weights"]
