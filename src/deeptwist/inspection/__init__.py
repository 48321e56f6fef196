"""Find a model's layers, and which of them are safe to touch."""
