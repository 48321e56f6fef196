"""DeepTwist: train unchanged, distort now and then."""

from deeptwist.twist.distortion import DeepTwist, Distortion

__all__ = ["DeepTwist", "Distortion"]
