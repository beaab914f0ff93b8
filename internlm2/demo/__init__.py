"""What only `python -m internlm2 demo` and `demo-check` need: the same model on plain PyTorch operators beside the kernels."""
