"""Triton's loss kernels on matrices whose rows begin at offsets beyond 2^31 elements. Operators on vectors never meet such
offsets, since they copy strided inputs.
"""

from far import assert_far

FAR = """
# 4 GiB of address space each, of which few pages are touched: rows 2^30 elements apart, so that the third is beyond 2^31
bases = [torch.empty(2**31 + 2**16, dtype=torch.bfloat16) for _ in range(2)]
def far(rows, cols, base=0):
    x = bases[base].as_strided((rows, cols), (2**30, 1))
    return x.copy_(torch.randn(rows, cols))
def agree(function, *tensors, upstream=1.0):
    assert any(x.stride(0) >= 2**30 for x in tensors)
    up = lambda i, y: torch.full_like(y, upstream)
    got, want = results(function, tensors, up), results(function, [x.contiguous() for x in tensors], up)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b) and b.isfinite().all() and b.any(), (i, a, b)
labels = torch.tensor([7, 0, 69])
options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "backend": "triton"}
for reduction in ("none", "mean", "sum"):
    agree(lambda x: ik.cross_entropy(x, labels, reduction=reduction, **options), far(3, 70), upstream=0.5)
logits = far(3, 70)
near = logits.contiguous()
for x in (logits, near):
    x.requires_grad_()
    loss = ik.cross_entropy(x, labels, reduction="none", inplace_backward=True, backend="triton")
    assert torch.autograd.grad(loss.sum(), x)[0].data_ptr() == x.data_ptr()
assert torch.equal(logits.detach(), near.detach()), "in place"
words = torch.tensor([2, 0, 1])
for hidden, weight in ((far(3, 64), torch.randn(3, 64).bfloat16()), (torch.randn(3, 64).bfloat16(), far(3, 64)),
                       (far(3, 64), far(3, 64, 1))):
    for reduction in ("none", "mean"):
        agree(lambda h, w: ik.linear_cross_entropy(h, w, words, reduction=reduction, **options), hidden, weight, upstream=0.5)
    agree(lambda h, w: ik.linear_logprobs(h, w, words, return_entropy=True, backend="triton"), hidden, weight)
last = bases[0].as_strided((2, 64), (2**31, 1)).copy_(torch.randn(2, 64))
agree(lambda h, w: ik.reward_loss_from_last(h, w, backend="triton"), last, torch.randn(64).bfloat16())
cu = torch.tensor([0, 2, 3], dtype=torch.int32)
agree(lambda h, w: ik.reward_loss(h, w, cu, backend="triton"), far(3, 64), torch.randn(64).bfloat16())
"""


def test_offsets_beyond_two_to_the_31(device):
    assert_far(FAR, device)
