"""Workload of `paged_attention`."""

import torch

from ..ops._attention import attend, check_options
from ..ops.paged_attention import blocks_in_use, gathered
from . import Case, Sample, Workload
from ._attention import pairs_of, sdpa


class Contiguous:
    """What PyTorch offers for decoding: F.scaled_dot_product_attention on the contiguous keys of each sequence, which `prepare`
    gathers beforehand.

    `folded` makes the query heads of a group the rows of one product, so that they share each read of a key. It needs sequences
    with one new token each.
    """

    def __init__(self, enable_gqa, folded=False):
        self.enable_gqa, self.folded = enable_gqa, folded

    def __call__(self, *args, **kwargs):
        return self.run(**self.prepare(*args, **kwargs))

    def prepare(self, q, k_cache, v_cache, block_table, seq_lens, *, cu_seqlens_q=None, scale=None, window=None, softcap=0.0,
                k_scale=None, v_scale=None, return_lse=False, max_seqlen_q=None):
        scale, left, right, softcap = check_options("paged_attention", q.shape[-1], scale, window, softcap)
        parts = list(gathered(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, k_scale, v_scale, q.dtype, left))
        if len({(one[0].shape, one[1].shape) for one in parts}) == 1:  # equal lengths: one batched call
            parts = [tuple(torch.stack(t) for t in zip(*parts, strict=True))]
        else:
            parts = [tuple(t[None] for t in one) for one in parts]
        return dict(parts=parts, q=q, scale=scale, left=left, softcap=softcap, return_lse=return_lse)

    def run(self, parts, q, scale, left, softcap, return_lse):
        if softcap or return_lse:
            results = [attend(*one, left, 0, scale, softcap) for part in parts for one in zip(*part, strict=True)]
            out = torch.cat([o for o, _ in results]) if results else q.clone()
            lse = torch.cat([x for _, x in results], 1).float() if results else q.new_empty((q.shape[1], 0)).float()
            return (out, lse) if return_lse else out
        outs = [self._one(part, left, scale).flatten(0, 1) for part in parts]
        return torch.cat(outs) if outs else q.clone()

    def _one(self, part, left, scale):
        q, k, v = part
        if not self.folded or q.shape[1] != 1:
            return sdpa(q, k, v, left, 0, scale, self.enable_gqa)
        group = q.shape[2] // k.shape[2]
        rows = q.view(q.shape[0], k.shape[2], group, -1)  # with one new token, the query heads of a group become the rows
        if left >= 0:
            k, v = k[:, -left - 1:], v[:, -left - 1:]
        out = torch.nn.functional.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), scale=scale)
        return out.reshape(q.shape)


def _lengths(dims):
    """(number of new tokens, number of keys including them) of every sequence of a case."""
    return [(new, old + new) for new, old in zip(dims["new"], dims["cached"], strict=True)]


def _sample(case, dtype, device, generator):
    dims, size = case.dims, case.dims["block_size"]
    heads, kv_heads, head_dim = dims["heads"], dims["kv_heads"], dims["head_dim"]
    lengths = _lengths(dims)
    left = dims.get("window", (-1, 0))[0]
    used = [-(-length // size) for _, length in lengths]
    spare, widest = 2, max(used, default=0) + 1
    blocks = sum(used) + spare
    order = torch.randperm(blocks, generator=generator, device=device).int()
    # Entries after the last block, and before the first block in the window, hold an invalid block number.
    table = torch.full((len(lengths), widest), -(2**30), dtype=torch.int32, device=device)
    first = 0
    for row, (length, count) in enumerate(zip(lengths, used, strict=True)):
        begin, end = blocks_in_use(*length, left, size)
        table[row, begin:end] = order[first + begin: first + end]
        first += count
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)
    inputs = {"q": draw(sum(new for new, _ in lengths), heads, head_dim).to(dtype)}
    for name in ("k", "v"):
        x = draw(blocks, size, kv_heads, head_dim)
        if dims.get("int8"):
            scale = x.abs().amax(-1) / 127
            inputs[f"{name}_cache"] = (x / scale[..., None]).round().to(torch.int8)
            inputs[f"{name}_scale"] = scale
        else:
            inputs[f"{name}_cache"] = x.to(dtype)
    if not dims.get("int8"):
        _poison(inputs, table, lengths, size, left)
    inputs |= {"block_table": table,
               "seq_lens": torch.tensor([length for _, length in lengths], dtype=torch.int32, device=device)}
    if any(new != 1 for new, _ in lengths):
        inputs["cu_seqlens_q"] = torch.tensor([0, *(new for new, _ in lengths)], dtype=torch.int32).cumsum(
            0, dtype=torch.int32).to(device)
    inputs |= {name: dims[name] for name in ("window", "softcap", "scale", "return_lse") if dims.get(name)}
    return Sample(inputs)


def _poison(inputs, table, lengths, size, left):
    """Fills the slots after the end of each sequence, and the unused blocks, with NaN: the operator must not read them."""
    for name in ("k_cache", "v_cache"):
        kept = torch.zeros(inputs[name].shape[:2], dtype=torch.bool, device=table.device)
        for row, (new, length) in enumerate(lengths):
            begin, end = blocks_in_use(new, length, left, size)
            slots = torch.arange(begin * size, min(length, end * size), device=table.device)
            kept[table[row, slots // size].long(), slots % size] = True
        inputs[name][~kept] = float("nan")


def _bytes(dims, size, direction):
    keys = sum(length for _, length in _lengths(dims)) * dims["kv_heads"]
    cache = 2 * keys * (dims["head_dim"] + 4 if dims.get("int8") else dims["head_dim"] * size)
    return cache + 2 * sum(dims["new"]) * dims["heads"] * dims["head_dim"] * size


def _flops(dims, direction):
    left = (dims.get("window") or (-1, 0))[0]
    pairs = sum(pairs_of(new, length, left, 0) for new, length in _lengths(dims))
    return 4 * pairs * dims["heads"] * dims["head_dim"]


def _case(kind, new, cached, heads, kv_heads, head_dim, block_size, **options):
    return Case(kind, {"new": tuple(new), "cached": tuple(cached), "heads": heads, "kv_heads": kv_heads,
                       "head_dim": head_dim, "block_size": block_size, **options})


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        _case("smoke", (1, 1, 1), (0, 33, 70), 4, 2, 64, 16),
        _case("smoke", (1, 7, 3), (64, 0, 20), 6, 1, 32, 5, return_lse=True),
        _case("smoke", (1, 5), (40, 9), 4, 4, 64, 8, int8=True),
        _case("smoke", (4, 1), (21, 50), 2, 1, 40, 1, window=(11, 0), softcap=4.0),
        _case("edge", (), (), 2, 1, 32, 4),
        _case("edge", (0, 2), (3, 0), 2, 1, 32, 4, return_lse=True),
        _case("edge", (1,), (255,), 8, 1, 128, 256, int8=True),
        *(Case("model", _case("model", (1,) * batch, (keys - 1,) * batch, heads, kv_heads, 128, 64, **options).dims,
               dtypes=(torch.bfloat16,))
          for heads, kv_heads in ((16, 8), (32, 8), (48, 8)) for batch, keys in ((1, 32768), (8, 8192))
          for options in ({}, {"int8": True})),
        *(Case("gpu", _case("gpu", (1,) * batch, (keys - 1,) * batch, heads, 8, 128, 64, **options).dims,
               dtypes=(torch.bfloat16,))
          for heads in (16, 32) for batch, keys in ((1, 262144), (8, 32768), (64, 4096)) for options in ({}, {"int8": True})),
    ),
    eager={"SDPA enable_gqa, contiguous keys": Contiguous(True), "SDPA expanded contiguous keys": Contiguous(False)},
    batched=(),
    bytes=_bytes,
    flops=_flops,
    rowwise=False,
    contiguous=("k_cache", "v_cache", "k_scale", "v_scale"),
    domain={"head_dim": (32, 136, 8), "block_size": (1, 20, 1)},
)
