"""The benchmark suite: every registered operator against PyTorch eager, torch.compile and, where installed, Liger.

`python -m benchmarks --help` says how to run it. Nothing here lists operators: sizes, inputs, eager forms, bytes and
flops come from the registry, what counts as done from gates.toml.
"""
