"""Training without labels: parameters of a part of a model learn to give what the original gave."""
