"""The training system: recipes, the loop, evaluation, and the whole job with its records."""
