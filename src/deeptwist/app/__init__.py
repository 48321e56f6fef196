"""What needs the extra cli: recipes, training, data, models, the report and the command line."""
