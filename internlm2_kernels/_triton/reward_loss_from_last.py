"""Reward loss from the last tokens' hidden states. Contract: ops/reward_loss.py; kernels: reward_loss.py."""


from .reward_loss import _backward, _forward


def reward_loss_from_last_fwd(last_hidden, head_weight, gamma, penalty_weight, bound, margin):
    return _forward("reward_loss_from_last", last_hidden, head_weight, None, gamma, penalty_weight, bound, margin)


def reward_loss_from_last_bwd(dloss, drewards, last_hidden, head_weight, slopes, needs_dhidden, needs_dweight):
    return _backward("reward_loss_from_last", dloss, drewards, last_hidden, head_weight, None, slopes, needs_dhidden,
                     needs_dweight)
