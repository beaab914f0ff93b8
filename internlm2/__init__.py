"""InternLM2 in a few files: configuration, model, checkpoints, tokenizer and trainers, on the operators of internlm2_kernels.

Start reading at config.py (sizes, and configuration files), model.py (the whole network) and training/stages/pretrain.py
(from text to a trained model).
"""
