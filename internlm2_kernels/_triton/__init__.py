"""Triton kernels and their launchers, one module an operator, imported at the first call."""
