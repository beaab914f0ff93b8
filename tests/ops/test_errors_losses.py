"""Wrong inputs of the losses and the optimizer: errors as in test_errors.py, on every backend that runs on a CPU."""

import math

import pytest
import torch

import internlm2_kernels as ik

NAN, INF = math.nan, math.inf
LOGITS, HIDDEN, WEIGHT = torch.randn(4, 9), torch.randn(4, 6), torch.randn(9, 6)
LABELS = torch.tensor([0, 8, -100, 3])
TOKENS = torch.tensor([0, 8, 1, 3])
X, MASK = torch.randn(6), torch.ones(6, dtype=torch.bool)
HEAD = torch.randn(6)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def entropy(logits=LOGITS, labels=LABELS, **options):
    return lambda: ik.cross_entropy(logits, labels, **options)


def linear(hidden=HIDDEN, weight=WEIGHT, labels=LABELS, **options):
    return lambda: ik.linear_cross_entropy(hidden, weight, labels, **options)


def logprobs(hidden=HIDDEN, weight=WEIGHT, tokens=TOKENS, **options):
    return lambda: ik.linear_logprobs(hidden, weight, tokens, **options)


def reward(hidden=HIDDEN, head=HEAD, cu=int32(0, 1, 4), **options):
    return lambda: ik.reward_loss(hidden, head, cu, **options)


def gae(rewards=X, values=X, cu=int32(0, 2, 6), **options):
    return lambda: ik.gae(rewards, values, cu, **options)


def policy(a=X, b=X, c=X, mask=MASK, **options):
    return lambda: ik.ppo_policy_loss(a, b, c, mask, **options)


def value(a=X, b=X, c=X, mask=MASK, **options):
    return lambda: ik.ppo_value_loss(a, b, c, mask, **options)


def adamw(param=X, grad=X, m=X, v=X, master=None, **options):
    return lambda: ik.adamw(param, grad, m, v, master, **{"step": 1, **options})


def numbers(call, op, argument, expected, wrong):
    """One case (call, exception, message) for each number in `wrong`, which the option `argument` must refuse."""
    only_too_large = lambda x: x in (10**400, 1e39) and "finite number >=" in expected
    return [(call(**{argument: x}), ValueError, f"{op}: {argument}: expected {expected}"
             f"{', within the range of float32' if only_too_large(x) else ''}, got {x!r}") for x in wrong]


ANY = (NAN, INF, -INF, True, "1", 10**400)  # what every numeric option refuses; 10**400 is beyond float64
CASES = [
    # cross_entropy
    (entropy(inplace_backward="yes"), TypeError, "cross_entropy: inplace_backward: expected True or False, got 'yes'"),
    (entropy([1.0]), TypeError, "cross_entropy: logits: expected a tensor, got list"),
    (entropy(LOGITS.long()), TypeError,
     "cross_entropy: logits: expected float32, bfloat16, float16 or float64, got torch.int64"),
    (entropy(torch.tensor(1.0)), ValueError, "cross_entropy: logits: expected a last dimension of at least 1, got []"),
    (entropy(torch.zeros(4, 0)), ValueError, "cross_entropy: logits: expected a last dimension of at least 1, got [4, 0]"),
    (entropy(labels=[0, 1]), TypeError, "cross_entropy: labels: expected an int64 or int32 tensor, got list"),
    (entropy(labels=X[:4]), TypeError, "cross_entropy: labels: expected torch.int64 or torch.int32, got torch.float32"),
    (entropy(labels=LABELS[:3]), ValueError,
     "cross_entropy: labels: expected shape [4] (the leading dimensions of logits), got [3]"),
    (entropy(labels=LABELS.to("meta")), ValueError,
     "cross_entropy: labels: expected a tensor on the device of logits, cpu, got meta"),
    (entropy(labels=LABELS.to_sparse()), TypeError,
     "cross_entropy: labels: expected a dense (strided) tensor, got torch.sparse_coo"),
    (entropy(labels=torch.tensor([0, 9, -100, 1])), ValueError,
     "cross_entropy: labels: expected values from 0 to 8 or ignore_index, got 9"),
    (entropy(labels=int32(0, 1, -1, 1)), ValueError,
     "cross_entropy: labels: expected values from 0 to 8 or ignore_index, got -1"),
    (entropy(ignore_index=-1), ValueError, "cross_entropy: labels: expected values from 0 to 8 or ignore_index, got -100"),
    (entropy(ignore_index=1.0), ValueError, "cross_entropy: ignore_index: expected an integer of 32 bits, got 1.0"),
    (entropy(ignore_index=2**31), ValueError, "cross_entropy: ignore_index: expected an integer of 32 bits, got 2147483648"),
    (entropy(reduction="avg"), ValueError, "cross_entropy: reduction: expected 'mean', 'sum' or 'none', got 'avg'"),
    (entropy(reduction=["mean"]), ValueError, "cross_entropy: reduction: expected 'mean', 'sum' or 'none', got ['mean']"),
    *numbers(entropy, "cross_entropy", "label_smoothing", "a number from 0 to 1", (*ANY, -0.1, 1.1)),
    *numbers(entropy, "cross_entropy", "z_loss", "a finite number >= 0", (*ANY, -1e-9)),
    *numbers(entropy, "cross_entropy", "softcap", "0 (none) or a number between 1e-30 and 1e30", (*ANY, -1.0, 1e-40, 1e40)),
    # linear_cross_entropy
    (linear(None), TypeError, "linear_cross_entropy: hidden: expected a tensor, got NoneType"),
    (linear(weight=WEIGHT.half()), TypeError,
     "linear_cross_entropy: weight: expected the dtype of hidden, torch.float32, got torch.float16"),
    (linear(weight=WEIGHT[:, :5]), ValueError,
     "linear_cross_entropy: weight: expected shape [V, 6] with V at least 1, got [9, 5]"),
    (linear(weight=WEIGHT[:0]), ValueError,
     "linear_cross_entropy: weight: expected shape [V, 6] with V at least 1, got [0, 6]"),
    (linear(weight=HEAD), ValueError, "linear_cross_entropy: weight: expected shape [V, 6] with V at least 1, got [6]"),
    (linear(torch.zeros(4, 0), torch.zeros(9, 0)), ValueError,
     "linear_cross_entropy: hidden: expected a last dimension of at least 1, got [4, 0]"),
    (linear(labels=LABELS[None]), ValueError,
     "linear_cross_entropy: labels: expected shape [4] (the leading dimensions of hidden), got [1, 4]"),
    (linear(labels=LABELS + 1), ValueError,
     "linear_cross_entropy: labels: expected values from 0 to 8 or ignore_index, got 9"),
    (linear(labels=LABELS + 1, reduction="none"), ValueError,
     "linear_cross_entropy: labels: expected values from 0 to 8 or ignore_index, got 9"),
    (linear(token_weights=X[:3]), ValueError,
     "linear_cross_entropy: token_weights: expected the shape of labels, [4], got [3]"),
    (linear(token_weights=TOKENS), TypeError,
     "linear_cross_entropy: token_weights: expected float32, bfloat16, float16 or float64, got torch.int64"),
    (linear(reduction=None), ValueError, "linear_cross_entropy: reduction: expected 'mean', 'sum' or 'none', got None"),
    *numbers(linear, "linear_cross_entropy", "label_smoothing", "a number from 0 to 1", (NAN, 2)),
    # linear_logprobs
    (logprobs(tokens=LABELS), ValueError, "linear_logprobs: tokens: expected values from 0 to 8, got -100"),
    (logprobs(tokens=TOKENS + 1), ValueError, "linear_logprobs: tokens: expected values from 0 to 8, got 9"),
    (logprobs(tokens=TOKENS.bool()), TypeError, "linear_logprobs: tokens: expected torch.int64 or torch.int32, got torch.bool"),
    (logprobs(return_entropy="no"), TypeError, "linear_logprobs: return_entropy: expected True or False, got 'no'"),
    (logprobs(return_hits=1), TypeError, "linear_logprobs: return_hits: expected True or False, got 1"),
    *numbers(logprobs, "linear_logprobs", "temperature", "a number from 1e-6 to 1e6", (*ANY, 0.0, -1.0, 1e-7)),
    # focal_ranking_loss, log_barrier_penalty
    (lambda: ik.focal_ranking_loss(X, X[:5]), ValueError,
     "focal_ranking_loss: rejected: expected shape [6] (the shape of chosen), got [5]"),
    (lambda: ik.focal_ranking_loss(X, X.double()), TypeError,
     "focal_ranking_loss: rejected: expected the dtype of chosen, torch.float32, got torch.float64"),
    (lambda: ik.focal_ranking_loss(TOKENS, TOKENS), TypeError,
     "focal_ranking_loss: chosen: expected float32, bfloat16, float16 or float64, got torch.int64"),
    *numbers(lambda **o: lambda: ik.focal_ranking_loss(X, X, **o), "focal_ranking_loss", "gamma", "a number from 0 to 100",
             (*ANY, -1.0, 101)),
    (lambda: ik.log_barrier_penalty(3.0), TypeError, "log_barrier_penalty: rewards: expected a tensor, got float"),
    (lambda: ik.log_barrier_penalty(X, outside="inf"), ValueError,
     "log_barrier_penalty: outside: expected 'linear' or 'clamp', got 'inf'"),
    *numbers(lambda **o: lambda: ik.log_barrier_penalty(X, **o), "log_barrier_penalty", "bound", "a number from 1e-6 to 1e6",
             (*ANY, 0, -5.0)),
    *numbers(lambda **o: lambda: ik.log_barrier_penalty(X, **o), "log_barrier_penalty", "margin",
             "a number from 1e-6 to bound / 2", (*ANY, 0.0, 2.6)),
    # reward_loss
    (reward(cu=int32(0, 4)), ValueError,
     "reward_loss: cu_seqlens: expected an even number of sequences, chosen and rejected in turn, got 1"),
    (reward(cu=int32(0, 1, 2, 4)), ValueError,
     "reward_loss: cu_seqlens: expected an even number of sequences, chosen and rejected in turn, got 3"),
    (reward(cu=int32(0, 4, 4)), ValueError, "reward_loss: cu_seqlens: expected values that rise by at least 1, got 4 after 4"),
    (reward(cu=int32(0, 3, 2, 3, 4)), ValueError,
     "reward_loss: cu_seqlens: expected values that rise by at least 1, got 2 after 3"),
    (reward(cu=int32(1, 2, 4)), ValueError, "reward_loss: cu_seqlens: expected values that start at 0, got 1"),
    (reward(cu=int32(0, 2, 5)), ValueError, "reward_loss: cu_seqlens: expected values that end at 4, got 5"),
    (reward(cu=int32(0, 2, 3)), ValueError, "reward_loss: cu_seqlens: expected values that end at 4, got 3"),
    (reward(cu=torch.tensor([0, 2, 4])), TypeError, "reward_loss: cu_seqlens: expected torch.int32, got torch.int64"),
    (reward(cu=int32(0, 2, 4).to("meta")), ValueError,
     "reward_loss: cu_seqlens: expected a tensor on the device of hidden, cpu, got meta"),
    (reward(X), ValueError, "reward_loss: hidden: expected shape [rows, D], got [6]"),
    (reward(head=X[:5]), ValueError, "reward_loss: head_weight: expected shape [6] or [1, 6], got [5]"),
    (reward(head=HEAD.half()), TypeError,
     "reward_loss: head_weight: expected the dtype of hidden, torch.float32, got torch.float16"),
    (reward(HIDDEN.double()), TypeError,
     "reward_loss: head_weight: expected the dtype of hidden, torch.float64, got torch.float32"),
    *numbers(reward, "reward_loss", "penalty_weight", "a finite number >= 0", (*ANY, -0.02)),
    *numbers(reward, "reward_loss", "gamma", "a number from 0 to 100", (NAN, -2.0)),
    *numbers(reward, "reward_loss", "bound", "a number from 0.01 to 1e6", (INF, 0.0, 1e-3)),
    (lambda: ik.reward_loss_from_last(HIDDEN[:3], HEAD), ValueError,
     "reward_loss_from_last: last_hidden: expected an even number of rows, chosen and rejected in turn, got 3"),
    (lambda: ik.reward_loss_from_last(HIDDEN, HEAD[None, None]), ValueError,
     "reward_loss_from_last: head_weight: expected shape [6] or [1, 6], got [1, 1, 6]"),
    # gae
    (gae(LOGITS), ValueError, "gae: rewards: expected shape [T], got [4, 9]"),
    (gae(values=X[:5]), ValueError, "gae: values: expected shape [6] (the shape of rewards), got [5]"),
    (gae(values=X.bfloat16()), TypeError, "gae: values: expected the dtype of rewards, torch.float32, got torch.bfloat16"),
    (gae(cu=int32(0, 2, 5)), ValueError, "gae: cu_seqlens: expected values that end at 6, got 5"),
    (gae(cu=int32(2, 6)), ValueError, "gae: cu_seqlens: expected values that start at 0, got 2"),
    (gae(cu=int32(0, 4, 3, 6)), ValueError, "gae: cu_seqlens: expected values that never fall, got 3 after 4"),
    (gae(cu=int32(0, 6).to("meta")), ValueError,
     "gae: cu_seqlens: expected a tensor on the device of rewards, cpu, got meta"),
    (gae(mask=MASK[:5]), ValueError, "gae: mask: expected shape [6] (the shape of rewards), got [5]"),
    (gae(mask=[True] * 6), TypeError, "gae: mask: expected a tensor, got list"),
    (gae(bootstrap=X), ValueError, "gae: bootstrap: expected shape [2] (sequences), got [6]"),
    (gae(bootstrap=0.0), TypeError, "gae: bootstrap: expected a floating-point tensor, got float"),
    *numbers(gae, "gae", "gamma", "a number from 0 to 1", (*ANY, -0.1, 1.01)),
    *numbers(gae, "gae", "lam", "a number from 0 to 1", (*ANY, -0.1, 1.01)),
    # ppo
    (policy(b=X[:5]), ValueError, "ppo_policy_loss: old_logprobs: expected shape [6] (the shape of logprobs), got [5]"),
    (policy(c=X.half()), TypeError,
     "ppo_policy_loss: advantages: expected the dtype of logprobs, torch.float32, got torch.float16"),
    (policy(mask=MASK[:1]), ValueError, "ppo_policy_loss: mask: expected shape [6] (the shape of logprobs), got [1]"),
    (policy(mask=MASK.to_sparse()), TypeError,
     "ppo_policy_loss: mask: expected a dense (strided) tensor, got torch.sparse_coo"),
    *numbers(policy, "ppo_policy_loss", "clip", "a number from 0 to 1", (*ANY, -0.2, 1.5, None)),
    (value(c=X[:5]), ValueError, "ppo_value_loss: returns: expected shape [6] (the shape of values), got [5]"),
    (value(b=None), TypeError, "ppo_value_loss: old_values: expected a tensor, got NoneType"),
    (value(mask=None), TypeError, "ppo_value_loss: mask: expected a tensor, got NoneType"),
    *numbers(value, "ppo_value_loss", "clip", "None or a finite number >= 0", (*ANY, -0.2)),
    (lambda: ik.kl_penalty(X, X[:5]), ValueError,
     "kl_penalty: ref_logprobs: expected shape [6] (the shape of logprobs), got [5]"),
    (lambda: ik.kl_penalty(X, X, mask=X[:5] > 0), ValueError,
     "kl_penalty: mask: expected shape [6] (the shape of logprobs), got [5]"),
    (lambda: ik.kl_penalty(X, X, mask=[1]), TypeError, "kl_penalty: mask: expected a tensor, got list"),
    (lambda: ik.kl_penalty(X, X, estimator="k4"), ValueError,
     "kl_penalty: estimator: expected 'k1' or 'k2' or 'k3', got 'k4'"),
    # squared_norm, adamw
    (lambda: ik.squared_norm(None), TypeError, "squared_norm: tensors: expected a tensor or a list of tensors, got NoneType"),
    (lambda: ik.squared_norm([]), ValueError, "squared_norm: tensors: expected at least one tensor, got none"),
    (lambda: ik.squared_norm([X, TOKENS]), TypeError,
     "squared_norm: tensors: expected float32, bfloat16, float16 or float64, got torch.int64"),
    (lambda: ik.squared_norm([X, X.to("meta")]), ValueError,
     "squared_norm: tensors: expected a tensor on the device of the first, cpu, got meta"),
    (adamw(TOKENS), TypeError, "adamw: param: expected float32, bfloat16, float16 or float64, got torch.int64"),
    (adamw(grad=X[:5]), ValueError, "adamw: grad: expected shape [6] (the shape of param), got [5]"),
    (adamw(grad=X.bfloat16()), TypeError, "adamw: grad: expected torch.float32, got torch.bfloat16"),
    (adamw(X.bfloat16(), X.half()), TypeError, "adamw: grad: expected torch.bfloat16 or torch.float32, got torch.float16"),
    (adamw(m=X.half()), TypeError, "adamw: exp_avg: expected torch.float32 or torch.bfloat16, got torch.float16"),
    (adamw(X.double(), X.double()), TypeError, "adamw: exp_avg: expected torch.float64, got torch.float32"),
    (adamw(m=X.bfloat16()), TypeError, "adamw: exp_avg_sq: expected the dtype of exp_avg, torch.bfloat16, got torch.float32"),
    (adamw(master=X.bfloat16()), TypeError, "adamw: master: expected torch.float32, got torch.bfloat16"),
    *((adamw(step=x), ValueError, f"adamw: step: expected an integer of at least 1, got {x!r}") for x in (0, 1.0, True, -3)),
    (adamw(seed=-1), ValueError, "adamw: seed: expected an integer of at least 0, got -1"),
    *((adamw(betas=x), ValueError, f"adamw: betas: expected two numbers from 0 up to below 1, got {got!r}")
      for x, got in (((0.9,), (0.9,)), ((0.9, 1.0), 1.0), ((NAN, 0.9), NAN), (0.9, 0.9))),
    *numbers(adamw, "adamw", "eps", "a finite number >= 1.1754944e-38, float32's least normal one", (*ANY, -1e-8, 0.0, 1e-60)),
    (adamw(step=2**24 + 1), ValueError, "adamw: step: expected an integer of at most 2^24, got 16777217"),
    (adamw(offset=-1), ValueError, "adamw: offset: expected an integer of at least 0, got -1"),
    (adamw(maximize="x"), TypeError, "adamw: maximize: expected True or False, got 'x'"),
    (adamw(X.half(), X.half(), stochastic_rounding=True), TypeError,
     "adamw: stochastic_rounding: expected False for a float16 param: bfloat16 alone is rounded so, got True"),
    *numbers(adamw, "adamw", "weight_decay", "a finite number >= 0", (*ANY, -0.1)),
    *numbers(adamw, "adamw", "lr", "a finite number >= 0", (*ANY, -1e-3, 1e39)),
]


@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("call,kind,message", CASES, ids=[message[:120] for *_, message in CASES])
def test_wrong_input(call, kind, message, backend):
    with ik.use_backend(backend), pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind and str(caught.value) == message


@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_wrong_labels_are_found_before_anything_is_made(backend):
    """A label out of range raises the error before the forward computes gradients, and before the in-place form has overwritten
    any logit.
    """
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    logits, bad = LOGITS.clone().requires_grad_(), torch.tensor([0, 1, 2, 9])
    for call in (lambda: ik.linear_cross_entropy(hidden, weight, bad), lambda: ik.cross_entropy(logits, bad),
                 lambda: ik.linear_logprobs(hidden, weight, bad), lambda: ik.cross_entropy(logits, bad, inplace_backward=True)):
        with ik.use_backend(backend), pytest.raises(ValueError, match="expected values from 0 to 8"):
            call()
    assert torch.equal(logits, LOGITS)
