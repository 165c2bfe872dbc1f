"""Every pass of the toolkit, one file each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint

from calibrate.errors import UserError
from compress.passes.binarize import Binarize
from compress.passes.cast import Cast
from compress.passes.contract import Context, Pass, Target
from compress.passes.drop_layers import DropLayers
from compress.passes.extract_width import ExtractWidth
from compress.passes.fuse import Fuse
from compress.passes.fuse_layers import FuseLayers
from compress.passes.fuse_models import FuseModels
from compress.passes.fuse_tokens import FuseTokens
from compress.passes.hash_attention import HashAttention
from compress.passes.merge_tokens import MergeTokens
from compress.passes.nest_widths import NestWidths
from compress.passes.prune_tokens import PruneTokens
from compress.passes.prune_width import PruneWidth
from compress.passes.quantize import Quantize
from compress.passes.replace_norms import ReplaceNorms
from compress.passes.topk_attention import TopkAttention

__all__ = ["PASSES", "Context", "Pass", "Target", "known_passes"]

PASSES: tuple[type[Pass], ...] = (
    Quantize, Cast, DropLayers, PruneWidth, NestWidths, ExtractWidth, TopkAttention, HashAttention, FuseLayers,
    Binarize, PruneTokens, MergeTokens, FuseTokens, ReplaceNorms, Fuse, FuseModels,
)  # fmt: skip
"""The passes of this package; others come through the entry-point group ``compress.passes``."""


def known_passes() -> Mapping[str, type[Pass]]:
    """Pass classes by their name in a recipe: those of this package, then those that installed packages add.

    Raises:
        UserError: an entry point cannot be loaded, is no pass, or takes a name that is taken.
    """
    from importlib.metadata import entry_points

    return _known(entry_points)


@functools.cache
def _known(entry_points: Callable[..., Iterable[EntryPoint]]) -> dict[str, type[Pass]]:
    """Looked up once: what is installed is read from disk, and a recipe asks at every pass."""
    found = {entry.name: entry for entry in PASSES}
    for point in sorted(entry_points(group="compress.passes"), key=lambda point: point.name):
        where = f"entry point {point.value}"
        try:
            loaded = point.load()
        except Exception as error:
            raise UserError(where, f"cannot be loaded: {error}", "Repair or remove the package that adds it.") from error
        if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
            raise UserError(where, "is not a Pass", "An entry point of the group compress.passes names a subclass of Pass.")
        if found.setdefault(loaded.name, loaded) is not loaded:
            raise UserError(where, f"the name {loaded.name} is taken", "Give the pass another name.")
    return found
