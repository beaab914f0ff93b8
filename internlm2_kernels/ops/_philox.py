"""Counter-based random bits (Philox4x32-10) and stochastic rounding in plain PyTorch, for the references.

Element i of tensor k takes 16 bits of Philox4x32-10 with the key (seed low, seed high) and the counter (e low, e high,
4 k + stream, step), where e = i // 8. Of the four resulting words it takes word (i % 8) // 2: the low half for even i, the
high half for odd i. In a shard, i is the element's index in the whole tensor, which is its index in the shard plus `offset`.
Source: J. Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

import torch

MULTIPLIERS, WEYL, WORD = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF


def _high_low(a, b):
    """(high word, low word) of a * b for a tensor b of 32-bit numbers, computed by halves so that int64 does not overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter, key):
    """The four result words, int64 tensors, for a counter of four words (tensors or integers) and a key of two words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _high_low(MULTIPLIERS[0], c0)
        high1, low1 = _high_low(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def bits16(elements, seed, tensor_index, stream, step, device="cpu", offset=0):
    """Sixteen random bits, as int64, for each of `elements` consecutive elements, of which the first has the index `offset` in
    the whole tensor."""
    lead = offset % 8
    e = torch.arange((lead + elements + 7) // 8, dtype=torch.int64, device=device) + offset // 8
    other = lambda value: torch.full_like(e, value & WORD)
    words = philox((e & WORD, e >> 32, other(tensor_index * 4 + stream), other(step)), (seed & WORD, (seed >> 32) & WORD))
    halves = torch.stack([part for word in words for part in (word & 0xFFFF, word >> 16)], 1)
    return halves.flatten()[lead: lead + elements]


def stochastic_bfloat16(x, random):
    """float32 `x` in bfloat16. A number between two bfloat16 numbers is rounded away from zero with a probability equal to the
    fraction that bfloat16 discards, and otherwise towards zero.

    Values that are not finite are rounded to nearest.
    """
    number = x.float().contiguous().view(torch.int32).long() & WORD
    up = ((number + random.view(x.shape)) >> 16) << 16
    signed = torch.where(up >= 2**31, up - 2**32, up).to(torch.int32)
    rounded = signed.view(torch.float32).to(torch.bfloat16)
    largest = torch.finfo(torch.bfloat16).max
    rounded = torch.where(rounded.isinf(), torch.copysign(torch.full_like(rounded, largest), rounded), rounded)
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))
