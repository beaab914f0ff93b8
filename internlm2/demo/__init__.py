"""The commands `python -m internlm2 demo` and `demo-check`, which run a model with the kernels and with plain operators."""
