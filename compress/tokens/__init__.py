"""Fewer tokens on the way through the blocks: where they can leave, how many, and what that costs."""
