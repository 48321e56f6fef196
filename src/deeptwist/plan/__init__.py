"""Plan which layer is held by which decomposition, and say why the others are kept."""
