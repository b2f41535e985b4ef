"""Triton kernels, each beside the plain reference that defines it."""
