"""Workload of `apply_rope`."""





import torch

from ..ops.apply_rope import reference
from ..ops.rope_table import rope_table
from . import Case, Sample, Workload


def eager_rotate_half(q, k, cos, sin, positions=None, *, interleaved=False):
    """Hugging Face's form: x * cos + rotate_half(x) * sin, where cos and sin are [T, d]: each table beside a copy of itself,
    cast to the dtype of x."""
    if interleaved:
        return reference(q, k, cos, sin, positions, interleaved=True)
    if positions is not None:
        cos, sin = cos[positions.flatten()], sin[positions.flatten()]
    cos, sin = (torch.cat((t, t), -1).to(q.dtype).view(*q.shape[:-2], 1, q.shape[-1]) for t in (cos, sin))

    def turn(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return turn(q), turn(k)


def sample_tables(dims, dtype, device, generator):
    """The tables and positions of a case: one table row for each token, or positions in random order."""
    tokens, head_dim = dims["tokens"], dims["head_dim"]
    if dims.get("positions") is None:
        cos, sin = rope_table(tokens, head_dim, device=device, backend="reference")
        return cos, sin, None
    cos, sin = rope_table(tokens + 7, head_dim, device=device, backend="reference")
    positions = torch.randint(0, tokens + 7, (tokens,), generator=generator, device=device)
    return cos, sin, positions.to(torch.int32 if dims["positions"] == "int32" else torch.int64)


def _sample(case, dtype, device, generator):
    dims = case.dims
    cos, sin, positions = sample_tables(dims, dtype, device, generator)
    draw = lambda heads: torch.randn(dims["tokens"], heads, dims["head_dim"], generator=generator,
                                     device=device).to(dtype)
    inputs = {"q": draw(dims["heads"]), "k": draw(dims["kv_heads"]), "cos": cos, "sin": sin, "positions": positions}
    if dims.get("interleaved"):
        inputs["interleaved"] = True
    return Sample(inputs, ("q", "k"))


def rope_case(kind, tokens, heads, kv_heads, head_dim, **more):
    return Case(kind, {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, **more})


def _bytes(dims, size, direction):
    return 2 * dims["tokens"] * (dims["heads"] + dims["kv_heads"]) * dims["head_dim"] * size + (
        dims["tokens"] * dims["head_dim"] * 4)


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        rope_case("smoke", 5, 4, 2, 64),
        rope_case("smoke", 33, 6, 1, 96, positions="int32"),
        rope_case("smoke", 17, 3, 3, 128, positions="int64", interleaved=True),
        rope_case("edge", 0, 2, 1, 32, positions="int64"),
        rope_case("edge", 1, 1, 1, 2),
        rope_case("edge", 7, 2, 1, 6, interleaved=True),
        rope_case("edge", 65, 3, 1, 34, positions="int64"),
        *(rope_case(kind, tokens, heads, 8, 128, positions="int64") for kind, tokens in (("model", 4096), ("gpu", 16384))
          for heads in (16, 32, 48)),
    ),
    eager={"float32 halves": reference, "rotate_half": eager_rotate_half},
    batched=("q", "k", "positions", "cos", "sin"),
    bytes=_bytes,
    flops=lambda dims, direction: 3 * dims["tokens"] * (dims["heads"] + dims["kv_heads"]) * dims["head_dim"],
)
