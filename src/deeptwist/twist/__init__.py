"""DeepTwist: train unchanged, distort now and then."""
