"""Exact rewrites of a model, each a rule: where its graph proves that fewer operations give the same function."""
