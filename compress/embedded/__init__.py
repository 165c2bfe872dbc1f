"""The small trained model and the digits that ship with the package."""

from compress.embedded.digits import SPLITS, digits_model, digits_rows
from compress.embedded.digits_vit import DigitsViT

__all__ = ["SPLITS", "DigitsViT", "digits_model", "digits_rows"]
