"""The training system: settings, the loop, evaluation, and the whole job with its records."""
