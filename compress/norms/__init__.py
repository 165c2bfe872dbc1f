"""Normalisations that training turns into factors of the layers after them."""
