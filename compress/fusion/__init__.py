"""Fusion of whole models: which units of one are which units of another, and one model of both."""
