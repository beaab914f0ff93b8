"""InternLM2 in a few files: configuration, model, checkpoints, tokenizer and trainers, on the operators of internlm2_kernels.

Start at config.py (sizes and files), model.py (the whole network) and training/stages/pretrain.py (text in, model out).
"""
