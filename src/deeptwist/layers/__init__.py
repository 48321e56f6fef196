"""Layers without their numbers: geometry, lowering, and the modules that factored layers are."""
