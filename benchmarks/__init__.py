"""The benchmark suite: every registered operator against eager PyTorch, torch.compile and other libraries' kernels.

`python -m benchmarks --help` says how to run it, docs/benchmarks.md how it measures. Sizes, inputs, eager forms, bytes and
flops come from the registry. Operators are named in two places only: gates.toml, which says what counts as done, and peers.py,
which holds other libraries' kernels.
"""
