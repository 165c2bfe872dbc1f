"""MEASURES: grids, ranges, statistics, data, fidelity and time. Imports torch, never ``export`` or ``compress``."""
