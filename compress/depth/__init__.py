"""Shallower models: sublayers and blocks, what each is worth, how they are taken out, and what is left repaired."""
