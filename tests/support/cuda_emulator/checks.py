"""`python checks.py LIBRARY NAME`: one check of the emulated CUDA kernels, in a process of its own."""

import ctypes
import sys

import torch

import internlm2_kernels as ik
from internlm2_kernels.testing import Draw, assert_ladder, draw_upstream, run
from internlm2_kernels.workloads import Case

LOW = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


def ladder(name, case, dtype):
    """Forward and backward pass the error ladder (testing.py's check of errors against a float64 gold). Fresh memory is filled
    with NaN, so an output element that no kernel writes fails too.
    """
    op, generator = ik.OPS[name], torch.Generator().manual_seed(7)
    sample = op.workload.sample(case, dtype, CPU, generator)
    upstream = draw_upstream(op, sample, 1.0, generator)
    assert_ladder(op, [Draw(sample, run(op, sample, "cuda", upstream), upstream)], f"{case} {dtype}")


def small(name):
    for case in ik.OPS[name].workload.cases:
        for dtype in LOW if case.kind in ("smoke", "edge") else ():
            ladder(name, case, dtype)


def rms_norm_shapes():
    """Sizes for each form of the kernels: one warp for each row; a block for each row whose threads keep 1, 2 or 4 pieces of it
    in registers; rows too long to be kept; 16-byte and single-element accesses; and several rows for each chunk of the
    backward.
    """
    bf16, f32 = torch.bfloat16, torch.float32
    for rows, cols, dtype in ((3, 384, bf16), (2, 4096, bf16), (2, 8192, bf16), (2, 8200, bf16), (2, 8193, bf16),
                              (3, 509, f32), (2, 2048, f32), (1, 8192, f32), (1, 8196, f32)):
        ladder("rms_norm", Case("", {"rows": rows, "cols": cols, "residual": True, "weight": "float32"}), dtype)
    ladder("rms_norm", Case("", {"rows": 258, "cols": 4096, "residual": True}), bf16)
    ladder("rms_norm", Case("", {"rows": 2050, "cols": 8}), bf16)


def qkv_rope_shapes():
    for heads, kv_heads, head_dim, tokens in ((48, 8, 128, 2), (3, 3, 512, 2), (2, 1, 2, 9), (8, 2, 20, 5), (4, 1, 1026, 2)):
        for dtype in (torch.bfloat16, torch.float32):
            ladder("qkv_rope", Case("", {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
                                         "positions": "int64"}), dtype)


def alignment_changes_no_bit():
    """A row that is not aligned to 16 bytes is read element by element, but summed in the same order, so the bits are equal."""
    x, weight = torch.randn(6, 7, 256), torch.randn(128)
    want = ik.rms_norm(x[:, 1:6, 8:136].contiguous(), weight, backend="cuda")
    assert torch.equal(ik.rms_norm(x[:, 1:6, 8:136], weight, backend="cuda"), want)
    shifted = torch.empty(6, 5, 137)[..., 9:]
    shifted.copy_(x[:, 1:6, 8:136])
    assert torch.equal(ik.rms_norm(shifted, weight, backend="cuda"), want)
    qkv, (cos, sin) = torch.randn(5, 4 * 64), ik.rope_table(5, 64)
    moved = torch.empty(5, 4 * 64 + 1)[:, 1:]
    moved.copy_(qkv)
    got, want = (ik.qkv_rope(x, cos, sin, num_heads=2, num_kv_heads=1, backend="cuda") for x in (moved, qkv))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def caches(library):
    """Outputs and caches equal the reference's bit for bit; a bad index writes nothing, gives NaN, and sets its error bit."""
    word = ctypes.CDLL(library).error_word
    word.restype = ctypes.POINTER(ctypes.c_int)
    for dtype in LOW:
        for heads, kv_heads, d in ((4, 2, 64), (6, 3, 34), (1, 1, 2), (8, 1, 128)):
            for quantized in (False, True):
                one_cache(dtype, heads, kv_heads, d, quantized, word())


def one_cache(dtype, heads, kv_heads, d, quantized, word):
    tokens, (cos, sin) = 13, ik.rope_table(20, d)
    positions, slots = torch.randint(0, 20, (tokens,)), torch.randperm(24)[:tokens]
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * d).to(dtype)
    qkv[3], qkv[4, 0], qkv[5], qkv[6], slots[2] = 0, float("nan"), float("nan"), float("inf"), -1
    qkv[7] *= 1e-44

    def write(backend):
        stored = torch.int8 if quantized else dtype
        scales = [torch.full((6, 4, kv_heads), 3.0) for _ in "kv"] if quantized else [None, None]
        cache = ik.KVCache(*(torch.full((6, 4, kv_heads, d), 7).to(stored) for _ in "kv"), slots, *scales)
        out = ik.qkv_rope(qkv, cos, sin, positions, num_heads=heads, num_kv_heads=kv_heads, cache=cache, backend=backend)
        return [*out, *(t for t in cache if t is not None)]

    got, want = write("cuda"), write("reference")
    for a, b in zip(got, want, strict=True):
        assert ((a == b) | ((a != a) & (b != b))).all()
    assert word[0] == 0
    positions[0], positions[9], slots[1] = 20, -1, 24
    bad = write("cuda")
    assert word[0] == sum(ik._registry._C.device_errors().values())
    word[0] = 0
    assert all(t[[0, 9]].isnan().all() for t in bad[:3]) and torch.equal(bad[0][1], got[0][1])
    flat = bad[3].view(24, kv_heads, d)
    assert (flat[slots[[0, 9]]] == 7).all()


def main(library, name):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    torch.ops.load_library(library)
    for op in ("rms_norm", "qkv_rope"):
        ik.OPS[op].usable["cpu"] += ("cuda",)
    checks = {"rms_norm": lambda: small("rms_norm"), "qkv_rope": lambda: small("qkv_rope"), "caches": lambda: caches(library),
              "rms_norm_shapes": rms_norm_shapes, "qkv_rope_shapes": qkv_rope_shapes, "alignment": alignment_changes_no_bit}
    checks[name]()


if __name__ == "__main__":
    main(*sys.argv[1:])
