"""One-bit layers: which sites become so, what trains them, and what they cost a device."""
