"""WRITES AND RUNS FILES: any ``nn.Module``, compressed or not. Imports ``calibrate``, never ``compress``."""
