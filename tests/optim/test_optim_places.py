"""FusedAdamW's random bits depend on a parameter's place in the optimizer; float64 parameters."""

import copy

import pytest
import torch
from optim_runs import BACKENDS, draw_gradients, steps

import internlm2_kernels as ik

RANDOM = {"lr": 1e-3, "weight_decay": 0.0, "master_weights": False, "stochastic_rounding": True}


def ones(count, dtype=torch.bfloat16, size=1024):
    return [torch.nn.Parameter(torch.ones(size, dtype=dtype)) for _ in range(count)]


def stepped(optimizer, params, which):
    """The parameters after two steps in which the parameters in `which` have gradients of 1."""
    for i, p in enumerate(params):
        p.grad = torch.ones_like(p) if i in which else None
    optimizer.step()
    optimizer.step()
    return [p.detach().clone() for p in params]


# --------------------------------------------------------------------------------------------------------- random bits
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_are_the_same_whichever_others_have_gradients(backend):
    """A parameter's random bits do not depend on which other parameters have gradients (experts without tokens have none).
    There are two groups, with a parameter of another dtype in between. No two parameters share random bits.
    """
    def run(which):
        params = ones(2) + ones(1, torch.float32) + ones(2)
        groups = [{"params": params[:3]}, {"params": params[3:]}]
        return stepped(ik.FusedAdamW(groups, backend=backend, moment_dtype=torch.bfloat16, **RANDOM), params, which)

    everything = run(range(5))
    low = [everything[i] for i in (0, 1, 3, 4)]
    assert not any(torch.equal(a, b) for i, a in enumerate(low) for b in low[:i])
    for which in ((1,), (0, 4), (2, 3), (4,)):
        got = run(which)
        for i in range(5):
            assert torch.equal(got[i], everything[i] if i in which else torch.ones_like(got[i])), (which, i)


def test_a_group_that_is_added_takes_bits_of_its_own():
    params = ones(4)
    alone = stepped(ik.FusedAdamW(params[:2], **RANDOM), params[:2], (0, 1))
    params = ones(4)
    optimizer = ik.FusedAdamW(params[:2], **RANDOM)
    optimizer.add_param_group({"params": params[2:]})
    together = stepped(optimizer, params, range(4))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=False))
    assert not any(torch.equal(a, b) for i, a in enumerate(together) for b in together[:i])


def test_indices_of_which_the_counter_has_no_room_are_refused():
    x, low = torch.ones(64), torch.zeros(64, dtype=torch.bfloat16)
    update = lambda index: ik.adamw(x, x, low, low, step=1, index=index, backend="cpp")[1]
    assert not torch.equal(update(0), update(2**30 - 1))
    for index in (2**30, 2**62):
        with pytest.raises(ValueError, match=f"adamw: index: expected an integer below 2\\^30, got {index}"):
            update(index)
    step = ik.OPS["adamw"].overloads["step_"]["cpp"]
    tensors, count, skipped = [torch.ones(9) for _ in range(4)], torch.zeros(()), torch.zeros((), dtype=torch.int64)
    for indices, message in (([1, 2], "expected 1 numbers, as many as params, got 2"), ([], "got 0"), ([-1], "got -1"),
                             ([2**30], "from 0 to 2\\^30 - 1, got 1073741824")):
        with pytest.raises(RuntimeError, match=f"ValueError: adamw: indices: .*{message}"):
            step([tensors[0]], [tensors[1]], [], [tensors[2]], [tensors[3]], [count], skipped, None, None, None,
                 torch.tensor(0.1), 0.9, 0.95, 1e-8, 0.1, 0.0, False, False, 0, indices)
        assert not count and not skipped and all((t == 1).all() for t in tensors)


# ------------------------------------------------------------------------------------------------------------- float64
@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("lr", (0.01, torch.tensor(0.003, dtype=torch.float64)), ids=str)
@pytest.mark.parametrize("beside", (False, True))
def test_float64_is_torchs_for_any_learning_rate(backend, lr, beside):
    """float64 parameters take PyTorch's steps at learning rates that float32 cannot represent, clipped by a norm in float64,
    with and without (`beside`) a float32 parameter in the same optimizer.
    """
    make = lambda: (ones(1, torch.float32, 7) if beside else []) + ones(2, torch.float64, 7)
    ours, theirs = make(), make()
    theirs = [torch.nn.Parameter(p.detach().double()) for p in theirs]
    a = ik.FusedAdamW(ours, lr=copy.deepcopy(lr), max_grad_norm=1.0, backend=backend)
    b = torch.optim.AdamW(theirs, lr=float(lr), betas=(0.9, 0.95), weight_decay=0.1)
    for seed in range(100):
        draw_gradients(ours, seed)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.double().clone()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        a.step()
        b.step()
    bound = 1e-7 if beside else 1e-14  # the norm includes a float32 gradient, whose norm has float32's error
    for p, q in zip(ours, theirs, strict=True):
        assert float((p.detach().double() - q.detach()).abs().max()) < (1e-5 if p.dtype == torch.float32 else bound)


@pytest.mark.parametrize("lr", (0.01, 0.003))
def test_the_operators_float64(lr):
    x, zero = torch.linspace(0.5, 2, 33, dtype=torch.float64), torch.zeros(33, dtype=torch.float64)
    results = [ik.adamw(x, x, zero, zero, step=1, lr=lr, backend=backend) for backend in ("reference", "cpp")]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-15, atol=1e-15)


def test_a_schedule_of_a_float_fills_each_dtypes_rate():
    """A group with float32 and float64 parameters holds its learning rate in one tensor for each dtype. When the rate changes,
    both tensors must follow.
    """
    params = ones(1, torch.float32, 5) + ones(1, torch.float64, 5)
    optimizer = ik.FusedAdamW(params, lr=0.0, weight_decay=0.0, backend="cpp")
    steps(optimizer, params, 1)
    assert all((p == 1).all() for p in params)
    optimizer.param_groups[0]["lr"] = 0.01
    steps(optimizer, params, 1, 1)
    assert all((p != 1).all() for p in params)
