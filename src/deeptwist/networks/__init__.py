"""Networks by name, and trained weights for them."""
