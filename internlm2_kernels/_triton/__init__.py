"""Triton kernels and their launchers. The module of an operator is imported at the operator's first call."""
