"""Narrower models: units (attention heads, MLP neurons), what each is worth, and how they are taken out."""
