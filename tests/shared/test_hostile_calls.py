"""Calls that no caller should make: each returns, or raises a TypeError or ValueError that begins with the operator's name.

A call takes the arguments of a smoke case and replaces up to three of them by something hostile. The returned
values are not checked: only that there is no other error, no endless loop and no request for an unreasonable amount of memory.
"""

import contextlib
import decimal
import fractions
import inspect
import random
import signal

import pytest
import torch
from shared import sample_of, smoke_cases

from internlm2_kernels import OPS, FusedAdamW, nn, use_backend

CALLS = 20_000
# How an error message may begin, where it need not begin with the name of the called function. A module checks what its
# operator does not, and torch's own base class of optimizers checks the parameters of FusedAdamW.
SPEAKERS = {
    "RMSNorm": ("RMSNorm: ", "rms_norm: "), "RotaryEmbedding": ("RotaryEmbedding: ", "rope_table: ", "apply_rope: "),
    "SwiGLU": ("SwiGLU: ", "swiglu: "), "FlashAttention": ("FlashAttention: ", "flash_attention: "),
    "use_backend": ("backend: ",),
    "FusedAdamW": ("FusedAdamW: ", "params argument given to the optimizer should be", "optimizer can only optimize Tensors",
                   "optimizer got an empty parameter list", "can't optimize a non-leaf Tensor"),
}
SECONDS = 20  # of processor time, after which a call counts as endless; the slowest takes a tenth of a second
CPU = torch.device("cpu")
SCALARS = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, -10**30, 10**400, 0.0, -0.0, 0.5, -1.5, 1e-320, 1e39, 1e308,
    float("nan"), float("inf"), float("-inf"), 1j, fractions.Fraction(1, 3), decimal.Decimal("0.1"), "", "mean", "hf",
    "cuda", b"x", (), [], {}, (1, 2), [-1, 0], (2**70, 0), (0.5, "a"), {"type": "yarn"}, {"factor": 1e400}, {1: 2}, object(),
    int, print, {"type": "linear", "factor": 10**400}, {"rope_type": "llama3", "factor": 0}, {"rope_type": ["yarn"]},
    {"type": "dynamic", "factor": 2.0, "max_position_embeddings": 10**30, "seq_len": 10**300},
)


def hostile_tensors(value, draw):
    """Functions that each make a tensor that is wrong in one way, starting from `value`, or from ones if it is not a tensor."""
    x = value if isinstance(value, torch.Tensor) else torch.ones(3, 4)
    dense = x.detach()
    as_float = dense if dense.is_floating_point() else dense.float()
    yield from (
        lambda: dense.to_sparse(), lambda: dense.to("meta"), lambda: dense.unsqueeze(0), lambda: dense[None, None],
        lambda: dense.flatten(), lambda: dense.sum(), lambda: dense[:0], lambda: dense[..., :0], lambda: dense.transpose(0, -1),
        lambda: dense.expand(2, *dense.shape), lambda: as_float.float().requires_grad_(), lambda: as_float.to(torch.complex64),
        lambda: torch.empty(0), lambda: torch.tensor(0.5), lambda: torch.tensor(3), lambda: torch.ones(2, 3).to_sparse_csr(),
        lambda: as_float.float().to_mkldnn(), lambda: torch.full_like(dense, 2**30 if dense.dtype != torch.int8 else 100),
        lambda: torch.full_like(as_float, float("nan")), lambda: -dense, lambda: dense.numpy(), lambda: dense.tolist(),
        lambda: torch.nn.Parameter(as_float.float()), lambda: dense.flip(0), lambda: [dense, None],
        lambda: [dense, dense.double()], lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        *(lambda dtype=dtype: dense.to(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16,
                                                          torch.int8, torch.int32, torch.int64, torch.bool, torch.uint8)),
    )


def hostile(value, draw):
    """A random hostile replacement for the argument `value`; None where the drawn kind of tensor cannot be made from it."""
    if draw.random() < (0.75 if isinstance(value, torch.Tensor) else 0.15):
        maker = draw.choice(list(hostile_tensors(value, draw)))
        try:
            return maker()
        except (RuntimeError, TypeError, NotImplementedError, IndexError):  # this tensor cannot be made so
            return None
    return draw.choice(SCALARS)


def endless(*_):
    raise AssertionError(f"the call took more than {SECONDS} s of processor time")


def outcome(function, arguments, names):
    """An empty text if the call returns, or raises an error that begins with its name; otherwise what happened instead."""
    signal.signal(signal.SIGPROF, endless)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        function(**arguments)
    except (TypeError, ValueError) as error:
        return "" if str(error).startswith(names) else f"{type(error).__name__}: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return ""


def candidates():
    """(name, function, usual arguments) of every operator on its smoke cases, of the modules and of the optimizer."""
    generator = torch.Generator().manual_seed(0)
    for op in OPS.values():
        options = {p.name: p.default for p in inspect.signature(op.public).parameters.values()
                   if p.default is not p.empty}
        for case in smoke_cases(op)[:2]:
            yield op.name, op.public, {**options, **sample_of(op, case, torch.float32, CPU, generator).inputs}
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    x, heads = draw(5, 8), {"q": draw(2, 5, 3, 8), "k": draw(2, 5, 1, 8)}
    for module, usual, call in (
        (nn.RMSNorm, {"normalized_shape": 8}, {"x": x, "residual": x}), (nn.SwiGLU, {"hidden_size": 8, "intermediate_size": 3},
                                                                         {"x": x}),
        (nn.RotaryEmbedding, {"head_dim": 8, "max_length": 16}, {**heads, "positions": torch.arange(10).view(2, 5)}),
        (nn.FlashAttention, {}, {**heads, "v": heads["k"], "return_lse": False}),
    ):
        options = {p.name: p.default for p in inspect.signature(module).parameters.values() if p.default is not p.empty}
        yield module.__name__, module, {**options, **usual}
        yield module.__name__, module(**usual), call
    options = {p.name: p.default for p in inspect.signature(FusedAdamW).parameters.values() if p.default is not p.empty}
    yield "FusedAdamW", FusedAdamW, {**options, "params": [torch.nn.Parameter(torch.ones(3))]}
    yield "FusedAdamW", stepped, {"grad": torch.ones(3), "closure": None, "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8,
                                  "weight_decay": 0.1, "maximize": False}
    yield "use_backend", entered, {"backend": "cpp"}


def entered(backend):
    with use_backend(backend):
        pass


def stepped(grad, closure, **settings):
    """One step of FusedAdamW after writing to its group, as a schedule does, and to the gradient of its parameter."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([parameter])
    with contextlib.suppress(RuntimeError, TypeError):  # torch itself refuses most gradients that do not fit
        parameter.grad = grad
    optimizer.param_groups[0].update(settings)
    optimizer.step(closure)


def hostile_calls(seed, count):
    draw, all_candidates = random.Random(seed), list(candidates())
    for _ in range(count):
        name, function, usual = draw.choice(all_candidates)
        changes = {argument: hostile(usual[argument], draw) for argument in draw.sample(list(usual), min(len(usual),
                                                                                        draw.choice((1, 1, 2, 3))))}
        if name in OPS and "backend" not in changes:
            changes["backend"] = draw.choice((None, "reference", "cpp"))
        yield name, function, {**usual, **changes}, changes


def run_calls(seed, count):
    wrong = {}
    for name, function, arguments, changes in hostile_calls(seed, count):
        found = outcome(function, arguments, SPEAKERS.get(name, f"{name}: "))
        if found:
            wrong.setdefault(f"{name}: {found[:150]}", {k: str(v)[:80] for k, v in changes.items()})
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_hostile_calls(seed):
    wrong = run_calls(seed, CALLS // 4)
    assert not wrong, "\n".join(f"{message}\n    {changes}" for message, changes in wrong.items())
