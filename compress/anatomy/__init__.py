"""What a transformer's parts are, found from its own graph: no table of class names, no table of families."""

from __future__ import annotations

from compress.anatomy.bridges import Bridge
from compress.anatomy.finding import find
from compress.anatomy.parts import ROLES, Anatomy, Block, Kind, Site

__all__ = ["ROLES", "Anatomy", "Block", "Bridge", "Kind", "Site", "find"]
