"""CHANGES MODELS: recipes, anatomy, passes, and the run that turns a recipe into validated files."""
