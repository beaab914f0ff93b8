"""Reward loss from the last tokens' hidden states. Contract: ops/reward_loss.py; kernels: reward_loss.py."""

import torch

from .reward_loss import _backward, _forward


def reward_loss_from_last_fwd(last_hidden, head_weight, gamma, penalty_weight, bound, margin):
    return _forward("reward_loss_from_last", last_hidden, head_weight, None, gamma, penalty_weight, bound, margin)


def reward_loss_from_last_bwd(dloss, drewards, last_hidden, head_weight, slopes, needs_dhidden, needs_dweight):
    return _backward("reward_loss_from_last", dloss, drewards, last_hidden, head_weight, None, slopes, needs_dhidden,
                     needs_dweight)


def audit(dtype, meta):
    weight, one = meta(4096, dtype=dtype), meta(dtype=torch.float32)
    for pairs in (8, 64):
        last, rewards = meta(2 * pairs, 4096, dtype=dtype), meta(2 * pairs, dtype=torch.float32)
        yield f"{pairs} pairs", lambda x=last: reward_loss_from_last_fwd(x, weight, 2.0, 0.02, 5.0, 1e-3)
    yield "64 pairs", lambda: reward_loss_from_last_bwd(one, rewards, last, weight, rewards, True, True)
