"""Batch norm on a GPU, in Triton: the functions of `reference` as kernels that run in Triton's interpreter as well."""
