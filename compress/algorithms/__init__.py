"""The mathematics of the methods: tensors in, tensors out, one paper a file."""
