"""What apply_rope and qkv_rope share: the rotation in plain PyTorch, and the checks of tables and positions."""

import torch

from .._checks import check_device, check_tensor, fail


def rows_of_table(cos, sin, positions, acc):
    """The rows of cos and sin that belong to the tokens, [T, 1, d/2], in the dtype `acc`. A position outside the table gives
    NaN."""
    if positions is None:
        return cos.to(acc).unsqueeze(-2), sin.to(acc).unsqueeze(-2)
    positions = positions.flatten()
    inside = ((positions >= 0) & (positions < cos.shape[0]))[:, None]
    safe = positions.clamp(0, max(cos.shape[0] - 1, 0))
    pick = lambda table: torch.where(inside, table.to(acc)[safe], float("nan")).unsqueeze(-2)
    return pick(cos), pick(sin)


def rotate(x, cos, sin, interleaved=False):
    """Rotates x [T, H, d] by the angles of cos and sin [T, 1, d/2]. It computes in the dtype of cos and rounds the result once
    to the dtype of x. PyTorch can differentiate it."""
    acc = cos.dtype
    if interleaved:
        a, b = x[..., 0::2].to(acc), x[..., 1::2].to(acc)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
    a, b = x.to(acc).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def check_tables(op, x, cos, sin, positions, tokens, head_dim, argument):
    """Checks cos, sin [P, d/2] and positions; without positions the tables must have one row for each token.

    Tables and positions must be on the device of `x`, the argument named `argument`.
    """
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(op, name, table)
        if table.dtype != torch.float32 and (table.dtype != torch.float64 or x.dtype != torch.float64):
            fail(TypeError, op, name, "float32", table.dtype)
        check_device(op, name, table, x, argument)
        if table.requires_grad:
            fail(ValueError, op, name, "a tensor that requires no gradient", "requires_grad=True")
    if cos.dim() != 2 or cos.shape[1] * 2 != head_dim:
        fail(ValueError, op, "cos", f"shape [P, {head_dim // 2}] (half the head size)", list(cos.shape))
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        fail(ValueError, op, "sin", f"shape and dtype of cos, {list(cos.shape)} {cos.dtype}",
             f"{list(sin.shape)} {sin.dtype}")
    if positions is None:
        if cos.shape[0] != tokens:
            fail(ValueError, op, "cos", f"one row a token, {tokens}, where positions are not given", cos.shape[0])
        return
    check_tensor(op, "positions", positions, "an int32 or int64 tensor")
    if positions.dtype not in (torch.int32, torch.int64):
        fail(TypeError, op, "positions", "an int32 or int64 tensor", positions.dtype)
    if tuple(positions.shape) != tuple(x.shape[: positions.dim()]) or positions.numel() != tokens:
        fail(ValueError, op, "positions", f"one position a token, the leading shape of {argument}",
             list(positions.shape))
    check_device(op, "positions", positions, x, argument)
    if cos.shape[0] == 0 and tokens > 0:
        fail(ValueError, op, "cos", "at least one row", 0)
