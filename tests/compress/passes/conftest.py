"""Lets the tests of passes use the small models of all families."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
