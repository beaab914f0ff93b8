"""Rotary position embedding applied to queries and keys."""

import torch

from .._autograd import distinct, once_differentiable
from .._checks import check_choice, check_device, check_float, check_same, fail, last_stride_1
from .._registry import OPS, Case, Op, Sample
from .rope_table import rope_table


def rows_of_table(cos, sin, positions, acc):
    """cos and sin of every token, [T, 1, d/2]; NaN where a position is outside the table."""
    if positions is None:
        return cos.to(acc).unsqueeze(-2), sin.to(acc).unsqueeze(-2)
    positions = positions.flatten()
    inside = ((positions >= 0) & (positions < cos.shape[0]))[:, None]
    safe = positions.clamp(0, max(cos.shape[0] - 1, 0))
    pick = lambda table: torch.where(inside, table.to(acc)[safe], float("nan")).unsqueeze(-2)
    return pick(cos), pick(sin)


def rotate(x, cos, sin, interleaved=False):
    """x [T, H, d] turned by the angles of cos, sin [T, 1, d/2]; differentiable, rounded once."""
    acc = cos.dtype
    if interleaved:
        a, b = x[..., 0::2].to(acc), x[..., 1::2].to(acc)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
    a, b = x.to(acc).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def reference(q, k, cos, sin, positions=None, *, interleaved=False):
    acc = torch.promote_types(q.dtype, torch.float32)
    cos, sin = rows_of_table(cos, sin, positions, acc)
    turn = lambda x: rotate(_as_heads(x), cos, sin, interleaved).view(x.shape)
    return turn(q), turn(k)


def _eager_rotate_half(q, k, cos, sin, positions=None, *, interleaved=False):
    """Hugging Face's form: tables doubled and cast to the activation's dtype, x * cos + rotate_half(x) * sin."""
    if interleaved:
        return reference(q, k, cos, sin, positions, interleaved=True)
    if positions is not None:
        cos, sin = cos[positions.flatten()], sin[positions.flatten()]
    cos, sin = (torch.cat((t, t), -1).to(q.dtype).view(*q.shape[:-2], 1, q.shape[-1]) for t in (cos, sin))

    def turn(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return turn(q), turn(k)


def _fake_fwd(q, k, cos, sin, positions, interleaved, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def sample_tables(dims, dtype, device, generator):
    """Tables and positions of a case: one row a token, or positions that restart as in a packed batch."""
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


APPLY_ROPE = Op(
    name="apply_rope",
    source="arXiv:2104.09864",
    summary="rotary embedding of q and k",
    reference=reference,
    public=lambda *args, **kwargs: apply_rope(*args, **kwargs),
    schemas={"fwd": "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse)"
                    " -> (Tensor q_out, Tensor k_out)"},
    fakes={"fwd": _fake_fwd},
    outputs=("q", "k"),
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
    eager={"float32 halves": reference, "rotate_half": _eager_rotate_half},
    batched=("q", "k", "positions", "cos", "sin"),
    bytes=_bytes,
    flops=lambda dims, direction: 3 * dims["tokens"] * (dims["heads"] + dims["kv_heads"]) * dims["head_dim"],
)
_FWD = APPLY_ROPE.overloads["fwd"]


class _ApplyRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, interleaved, backend):
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved, ctx.backend = interleaved, backend
        return native(_FWD[backend], q, k, cos, sin, positions, interleaved, False)

    @staticmethod
    @once_differentiable("apply_rope")
    def backward(ctx, dq, dk):
        cos, sin, positions = ctx.saved_tensors
        dq, dk = _FWD[ctx.backend](_as_heads(dq), _as_heads(dk), cos, sin, positions, ctx.interleaved, True)
        return dq, dk, None, None, None, None, None


def native(overload, *args):
    """Calls an overload whose C++ checks index values; those arrive as RuntimeError and leave as the ValueError they are.

    Inside a compiled graph nothing can catch them: there they stay a RuntimeError whose text begins with ValueError.
    """
    if torch.compiler.is_compiling():
        return overload(*args)
    try:
        return overload(*args)
    except RuntimeError as error:
        message = str(error)
        if "ValueError: " not in message:
            raise
        raise ValueError(_with_operator(overload, message.split("ValueError: ")[1].splitlines()[0])) from None


def _with_operator(overload, message):
    """Checks that several operators share do not know for whom they ask."""
    name = overload._schema.name.removeprefix("internlm2::")
    op = max((op for op in OPS if name.startswith(f"{op}_")), key=len)
    return message if message.startswith(f"{op}: ") else f"{op}: {message}"


def _as_heads(x):
    """[T, H, d] with a last stride of 1; a copy only where that cannot be a view."""
    if x.dim() != 3:
        x = x.flatten(0, -3) if x.dim() > 3 else x[None]
    return last_stride_1(x)


def check_tables(op, x, cos, sin, positions, tokens, head_dim, argument):
    """cos, sin [P, d/2] and positions (or one table row a token), all on the device of `argument`."""
    for name, table in (("cos", cos), ("sin", sin)):
        if not isinstance(table, torch.Tensor):
            fail(TypeError, op, name, "a tensor", type(table).__name__)
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
    if not isinstance(positions, torch.Tensor) or positions.dtype not in (torch.int32, torch.int64):
        fail(TypeError, op, "positions", "an int32 or int64 tensor", getattr(positions, "dtype", type(positions).__name__))
    if tuple(positions.shape) != tuple(x.shape[: positions.dim()]) or positions.numel() != tokens:
        fail(ValueError, op, "positions", f"one position a token, the leading shape of {argument}",
             list(positions.shape))
    check_device(op, "positions", positions, x, argument)
    if cos.shape[0] == 0 and tokens > 0:
        fail(ValueError, op, "cos", "at least one row", 0)


def check_range(op, argument, values, low, high):
    """Values of a CPU tensor within [low, high): what the compiled kernels check themselves, for the other backends."""
    if values is None or values.device.type != "cpu" or values.numel() == 0 or torch.compiler.is_compiling():
        return
    smallest, largest = int(values.min()), int(values.max())
    if smallest < low or largest >= high:
        fail(ValueError, op, argument, f"values from {low} to {high - 1}", smallest if smallest < low else largest)


def apply_rope(q, k, cos, sin, positions=None, *, interleaved=False, backend=None):
    """Rotary embedding: (a, b) -> (a cos - b sin, b cos + a sin) with a = x[i], b = x[i + d/2] for every i < d/2.

    Shapes:   q [..., H, d], k [..., G, d], cos, sin [P, d/2] from `rope_table`, positions int32 | int64 [...] (the leading
              dimensions; restarting with every packed sequence) or None: P is the number of tokens, one row a token
              -> q, k of the same shapes
    Options:  interleaved=True pairs x[2i] with x[2i + 1] (some InternEvo checkpoints)
    Dtypes:   float32 | bfloat16 | float16 | float64, tables float32; computed in float32, rounded once
    Backward: saves cos, sin and positions only; the rotation by the negative angle. Deterministic: yes
    Errors:   ValueError, TypeError; a position outside the table raises on CPU, on CUDA it makes that token NaN and is
              reported by `internlm2_kernels.check()`
    Cost:     memory-bound: reads and writes q and k once.   Source: arXiv:2104.09864 eq. 34
    """
    check_float("apply_rope", "q", q)
    check_same("apply_rope", "k", k, q, "q")
    if q.dim() < 2 or q.shape[-1] % 2 or q.shape[-1] == 0:
        fail(ValueError, "apply_rope", "q", "shape [..., heads, head_dim] with an even head_dim", list(q.shape))
    if k.dim() != q.dim() or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        fail(ValueError, "apply_rope", "k", f"the shape of q, {list(q.shape)}, but for the number of heads", list(k.shape))
    check_choice("apply_rope", "interleaved", interleaved, (False, True))
    head_dim = q.shape[-1]
    tokens = q.shape[:-2].numel()
    check_tables("apply_rope", q, cos, sin, positions, tokens, head_dim, "q")
    chosen = APPLY_ROPE.select(q, backend)
    if chosen == "reference":
        check_range("apply_rope", "positions", positions, 0, cos.shape[0])
        return reference(q, k, cos, sin, positions, interleaved=interleaved)
    flat_q, flat_k = _as_heads(q), _as_heads(k)
    cos, sin = cos.contiguous(), sin.contiguous()
    positions = None if positions is None else positions.reshape(-1).contiguous()
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        out_q, out_k = _ApplyRope.apply(*distinct(flat_q, flat_k), cos, sin, positions, interleaved, chosen)
    else:
        out_q, out_k = native(_FWD[chosen], flat_q, flat_k, cos, sin, positions, interleaved, False)
    return (out_q, out_k) if q.dim() == 3 else (out_q.view(q.shape), out_k.view(k.shape))
