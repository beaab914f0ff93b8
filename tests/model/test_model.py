"""Properties of InternLM2 besides equality with a reference: packing, precision, initial weights, autocast, compilation,
errors.
"""

import copy
import dataclasses
import pickle

import pytest
import torch

import internlm2.plain
from internlm2.config import PRESETS
from internlm2.model import InternLM2
from internlm2.reward import RewardModel

TINY = PRESETS["tiny"]
LENGTHS = [7, 1, 0, 19, 12]


def packed(lengths, generator, vocab_size=TINY.vocab_size):
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)
    tokens = torch.randint(0, vocab_size, (sum(lengths),), generator=generator)
    return tokens, cu_seqlens


def gradients(model, *args, **options):
    model.zero_grad(set_to_none=True)
    loss = model.loss(*args, **options)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_parameter_names_are_the_released_ones():
    layer = ["attention.wqkv", "attention.wo", "attention_norm", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"]
    expected = {f"model.layers.{i}.{part}.weight" for i in range(2) for part in [*layer, "ffn_norm"]}
    expected |= {"model.tok_embeddings.weight", "model.norm.weight", "output.weight"}
    state = InternLM2(TINY).state_dict()
    assert set(state) == expected
    assert state["model.layers.0.attention.wqkv.weight"].shape == ((4 + 2 * 2) * 32, 128)
    assert state["model.layers.1.feed_forward.w2.weight"].shape == (128, 256)


@pytest.mark.parametrize("operators", [None, internlm2.plain], ids=["kernels", "plain"])
def test_packed_is_a_loop_over_sequences(operators, generator):
    model = InternLM2(TINY, dtype=torch.float64, operators=operators)
    tokens, cu_seqlens = packed(LENGTHS, generator)
    labels = torch.randint(0, TINY.vocab_size, tokens.shape, generator=generator)
    labels[::5] = -100
    alone = [(t, la) for t, la in zip(tokens.split(LENGTHS), labels.split(LENGTHS), strict=True) if len(t)]
    one = lambda t: torch.tensor([0, len(t)], dtype=torch.int32)
    torch.testing.assert_close(model(tokens, cu_seqlens), torch.cat([model(t, one(t)) for t, _ in alone]), rtol=0, atol=1e-13)
    loss, grads = gradients(model, tokens, labels, cu_seqlens)
    total, summed = 0.0, {name: torch.zeros_like(g) for name, g in grads.items()}
    for t, la in alone:
        part, partial = gradients(model, t, la, one(t), reduction="sum")
        total += part
        summed = {name: summed[name] + g for name, g in partial.items()}
    count = (labels != -100).sum()
    torch.testing.assert_close(loss, total / count, rtol=1e-13, atol=0)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, summed[name] / count, rtol=0, atol=1e-14)


def test_neighbours_and_later_tokens_change_nothing_by_a_bit(generator):
    model = InternLM2(TINY)
    tokens, cu_seqlens = packed(LENGTHS, generator)
    logits = model(tokens, cu_seqlens)
    other = tokens.clone()
    other[8 + 10] = (other[8 + 10] + 1) % TINY.vocab_size  # in the middle of the sequence of tokens 8 to 26
    changed = model(other, cu_seqlens)
    assert torch.equal(changed[:18], logits[:18]) and torch.equal(changed[27:], logits[27:])
    assert not (changed[18:27] == logits[18:27]).all(-1).any()


def test_positions(generator):
    model = InternLM2(TINY, dtype=torch.float64)
    tokens, cu_seqlens = packed([5, 9], generator)
    default = model(tokens, cu_seqlens)
    positions = torch.cat([torch.arange(5), torch.arange(9)])
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(model(tokens, cu_seqlens, positions.to(dtype)), default)
    # Rotary attention depends on differences of positions only, up to the rounding of the float32 tables.
    torch.testing.assert_close(model(tokens, cu_seqlens, positions + 1000), default, rtol=0, atol=1e-6)
    assert (model(tokens, cu_seqlens, positions * 3) - default).abs().max() > 1e-4


def test_dynamic_scaling_is_each_sequences_own(generator):
    """With dynamic rotary scaling a long sequence gets the base for its own length. That changes no short sequence in the same
    batch or in a later one."""
    config = dataclasses.replace(TINY, max_position_embeddings=16, rope_scaling={"type": "dynamic", "factor": 2.0})
    model, unscaled = InternLM2(config), InternLM2(dataclasses.replace(config, rope_scaling=None))
    tokens, cu_seqlens = packed([10, 40, 23], generator)
    short = (tokens[:10], torch.tensor([0, 10], dtype=torch.int32))
    before = model(*short)
    together = model(tokens, cu_seqlens)
    assert torch.equal(model(*short), before) and torch.equal(unscaled(*short), before)
    torch.testing.assert_close(together[:10], before)
    for start, end in ((10, 50), (50, 73)):
        base = TINY.rope_theta * (2.0 * (end - start) / 16 - 1.0) ** (32 / 30)
        rebased = InternLM2(dataclasses.replace(config, rope_scaling=None, rope_theta=base))
        alone = rebased(tokens[start:end], torch.tensor([0, end - start], dtype=torch.int32))
        torch.testing.assert_close(together[start:end], alone)
        unlike = unscaled(tokens[start:end], torch.tensor([0, end - start], dtype=torch.int32))
        assert (together[start:end] - unlike).abs().max() > 1e-5


def test_tables_are_made_once_and_never_changed(generator):
    calls = []

    class Counting:
        rms_norm, swiglu, qkv_rope = internlm2.plain.rms_norm, internlm2.plain.swiglu, internlm2.plain.qkv_rope
        flash_attention, linear = internlm2.plain.flash_attention, internlm2.plain.linear
        linear_cross_entropy = internlm2.plain.linear_cross_entropy

        @staticmethod
        def rope_table(*args, **options):
            calls.append(args)
            return internlm2.plain.rope_table(*args, **options)

    model = InternLM2(TINY, operators=Counting)
    for lengths in ([20], [20], [31, 4], [32], [40], [20]):
        model(*packed(lengths, generator))
    assert [rows for rows, _ in calls] == [32, 64]


def test_bfloat16_compute_keeps_float32_parameters(generator):
    model, exact = InternLM2(TINY, compute_dtype=torch.bfloat16), InternLM2(TINY)
    tokens, cu_seqlens = packed(LENGTHS, generator)
    assert model(tokens, cu_seqlens).dtype == model.hidden_states(tokens, cu_seqlens).dtype == torch.bfloat16
    (loss, grads), (gold, gold_grads) = (gradients(m, tokens, tokens, cu_seqlens) for m in (model, exact))
    assert loss.dtype == torch.float32 and abs(loss - gold) < 0.02 * gold and loss != gold
    for name, gradient in grads.items():
        assert gradient.dtype == torch.float32
        assert (gradient - gold_grads[name]).norm() < 0.05 * gold_grads[name].norm(), name


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_checkpointed_layers_give_the_same_bits(compute_dtype, generator):
    models = [InternLM2(TINY, compute_dtype=compute_dtype, checkpoint_layers=c) for c in (False, True)]
    tokens, cu_seqlens = packed(LENGTHS, generator)
    (loss, grads), (again, grads_again) = (gradients(m, tokens, tokens, cu_seqlens) for m in models)
    assert torch.equal(loss, again) and all(torch.equal(grads[name], grads_again[name]) for name in grads)


def test_loss(generator):
    model = InternLM2(TINY)
    tokens, cu_seqlens = packed(LENGTHS, generator)
    labels = torch.randint(0, TINY.vocab_size, tokens.shape, generator=generator)
    labels[::3] = -100
    logits = model(tokens, cu_seqlens)
    expected = -logits.log_softmax(-1)[labels != -100, labels[labels != -100]]
    torch.testing.assert_close(model.loss(tokens, labels, cu_seqlens), expected.mean())
    torch.testing.assert_close(model.loss(tokens, labels, cu_seqlens, reduction="sum"), expected.sum())
    loss, grads = gradients(model, tokens, torch.full_like(labels, -100), cu_seqlens)
    assert loss == 0 and all((g == 0).all() for g in grads.values())


def test_initial_weights():
    config = dataclasses.replace(TINY, hidden_size=256, intermediate_size=512, num_layers=4, head_dim=64)
    state = InternLM2(config, seed=3).state_dict()
    again, other = InternLM2(config, seed=3).state_dict(), InternLM2(config, seed=4).state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    for name, tensor in state.items():
        if tensor.ndim == 1:
            assert (tensor == 1).all()
            continue
        expected = 0.02
        if name.endswith(("wo.weight", "w2.weight")):
            expected /= (2 * (int(name.split(".")[2]) + 1)) ** 0.5
        assert float(tensor.std()) == pytest.approx(expected, rel=0.03), name
        assert abs(float(tensor.mean())) < expected * 5 / tensor.numel() ** 0.5, name
        assert not torch.equal(tensor, other[name])
    assert (state["model.tok_embeddings.weight"][2] != 0).all()  # pad and end-of-sequence share id 2, which must learn


def test_end_of_sequence_learns():
    model = InternLM2(TINY)
    tokens = torch.tensor([1, 2, 7])
    _, grads = gradients(model, tokens, torch.tensor([2, 7, 2]), torch.tensor([0, 3], dtype=torch.int32))
    assert (grads["model.tok_embeddings.weight"][2] != 0).any()


def test_no_tokens():
    model = InternLM2(TINY)
    none = torch.zeros(0, dtype=torch.int64)
    for bounds in ([0], [0, 0, 0]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        assert model(none, cu_seqlens).shape == (0, TINY.vocab_size)
        assert gradients(model, none, none, cu_seqlens)[0] == 0


def test_models_can_be_copied_and_pickled(generator):
    model = InternLM2(TINY)
    batch = packed([6], generator)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(*batch), model(*batch))


def test_attention_is_written_for_any_group_size(generator):
    """internlm2.plain's attention equals a softmax written out in float64, with 6 query heads for each key head."""
    q = torch.randn(11, 12, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 11, 2, 8, dtype=torch.float64, generator=generator)
    got = internlm2.plain.flash_attention(
        q, k, v, causal=True, cu_seqlens_q=(cu := torch.tensor([0, 4, 11], dtype=torch.int32)), cu_seqlens_k=cu
    )
    for start, end in ((0, 4), (4, 11)):
        for t in range(start, end):
            for head in range(12):
                p = (k[start : t + 1, head // 6] @ q[t, head] / 8**0.5).softmax(0)
                torch.testing.assert_close(got[t, head], p @ v[start : t + 1, head // 6])


@pytest.mark.parametrize("checkpoint_layers", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("operators", [None, internlm2.plain], ids=["kernels", "plain"])
def test_a_float32_model_trains_under_autocast(operators, checkpoint_layers, generator):
    """The residual stream and the losses stay float32; products and attention run in bfloat16; gradients are float32."""
    model = InternLM2(TINY, operators=operators, checkpoint_layers=checkpoint_layers)
    tokens, cu_seqlens = packed(LENGTHS, generator)
    gold, gold_grads = gradients(model, tokens, tokens, cu_seqlens)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.hidden_states(tokens, cu_seqlens).dtype == torch.float32
        assert model(tokens, cu_seqlens).dtype == torch.bfloat16
        loss, grads = gradients(model, tokens, tokens, cu_seqlens)
    assert loss.dtype == torch.float32 and loss != gold and abs(loss - gold) < 1e-3 * gold
    for name, gradient in grads.items():
        assert gradient.dtype == torch.float32
        assert 0 < (gradient - gold_grads[name]).norm() < 0.02 * gold_grads[name].norm(), name


def test_log_probabilities_and_rewards_are_float32_under_autocast(generator):
    model, reward_model = InternLM2(TINY), RewardModel(TINY)
    tokens, cu_seqlens = packed([7, 12], generator)

    def numbers():
        return (model.logprobs(tokens, tokens.flip(0), cu_seqlens), reward_model.values(tokens, cu_seqlens),
                reward_model.rewards(tokens, cu_seqlens), *reward_model.loss(tokens, cu_seqlens))  # fmt: skip

    gold = numbers()
    with torch.autocast("cpu", torch.bfloat16):
        got = numbers()
    for a, b in zip(got, gold, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.01)
    got[-2].backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in reward_model.parameters())


PACKINGS = ([7, 1, 19, 12], [5, 9], [20, 4], [3, 3, 3, 3, 5, 3], [40, 2, 17, 2], [31, 31])


@pytest.mark.parametrize(("kind", "backend"), [
    ("loss", "aot_eager"),
    pytest.param("logprobs", "aot_eager", marks=pytest.mark.slow),
    pytest.param("reward", "aot_eager", marks=pytest.mark.slow),
    pytest.param("loss", "inductor", marks=pytest.mark.slow),
])  # fmt: skip
def test_one_graph_serves_all_packings(kind, backend, generator):
    """For batches of different packings torch.compile makes two graphs only: one for the sizes of the first batch and one for
    all sizes. Compiled by aot_eager, the results have the bits of eager mode."""
    config = dataclasses.replace(TINY, num_layers=1, vocab_size=64)
    model = RewardModel(config) if kind == "reward" else InternLM2(config)

    def step(tokens, labels, cu_seqlens):
        if kind == "reward":
            return model.loss(tokens, cu_seqlens)[0]
        return (model.loss if kind == "loss" else model.logprobs)(tokens, labels, cu_seqlens)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, backend=backend)
    for lengths in PACKINGS:
        tokens, cu_seqlens = packed(lengths, generator, config.vocab_size)
        labels = torch.randint(0, config.vocab_size, tokens.shape, generator=generator)
        results = []
        for run in (step, compiled):
            model.zero_grad()
            value = run(tokens, labels, cu_seqlens)
            value.sum().backward()
            results.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
        tolerance = dict(rtol=0, atol=0) if backend == "aot_eager" else dict(rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(*results, **tolerance)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


GOOD = dict(tokens=torch.arange(6), cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32), labels=torch.arange(6))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(tokens=[1, 2]), TypeError, "tokens must be a tensor of int64 or int32 with one dimension, got list"),
        (dict(tokens=torch.rand(6)), ValueError, r"tokens must be .*, got float32 \[6\]"),
        (dict(tokens=torch.zeros(2, 3, dtype=torch.int64)), ValueError, r"tokens must be .*, got int64 \[2, 3\]"),
        (
            dict(tokens=torch.arange(6) + 507),
            ValueError,
            r"tokens must lie in \[0, vocab_size = 512\), got values from 507 to 512",
        ),
        (dict(tokens=torch.arange(6) - 1), ValueError, "got values from -1 to 4"),
        (dict(cu_seqlens=[0, 6]), TypeError, "cu_seqlens must be a tensor of int32 .*, got list"),
        (dict(cu_seqlens=torch.tensor([0, 6])), ValueError, r"cu_seqlens must be a tensor of int32 .*, got int64 \[2\]"),
        (dict(cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)), ValueError, r"end at the number of tokens 6, got \[0, 5\]"),
        (dict(cu_seqlens=torch.tensor([1, 6], dtype=torch.int32)), ValueError, r"cu_seqlens must start at 0, .*\[1, 6\]"),
        (dict(cu_seqlens=torch.tensor([0, 4, 3, 6], dtype=torch.int32)), ValueError, "never fall"),
        (dict(cu_seqlens=torch.zeros(0, dtype=torch.int32)), ValueError, r"cu_seqlens must start at 0.*got \[\]"),
        (dict(positions=torch.arange(5)), ValueError, r"positions must be .* with shape \[6\], got int64 \[5\]"),
        (dict(positions=torch.arange(6) - 1), ValueError, "positions must be 0 or more, got -1"),
        (dict(positions=torch.rand(6)), ValueError, "positions must be .*, got float32"),
        (dict(labels=torch.arange(5)), ValueError, r"labels must be a tensor of int64 with shape \[6\], got int64 \[5\]"),
        (dict(labels=torch.arange(6) - 2), ValueError, r"labels must be -100 or in \[0, 512\), got -2"),
        (dict(labels=torch.full((6,), 512)), ValueError, "labels must be -100 or in"),
        (dict(reduction="none"), ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
    ],
)
def test_bad_input_is_named(change, kind, message):
    with pytest.raises(kind, match=message):
        InternLM2(TINY).loss(**GOOD | change)


def test_bad_construction_is_named():
    with pytest.raises(TypeError, match="config must be a ModelConfig, got dict"):
        InternLM2(TINY.to_dict())
    lacks = "operators must offer rms_norm, .* lacks rms_norm, swiglu, rope_table, qkv_rope, flash_attention"
    with pytest.raises(TypeError, match=lacks):
        InternLM2(TINY, operators=dataclasses)
    with pytest.raises(ValueError, match="compute_dtype must be dtype, or narrower than float32"):
        InternLM2(TINY, dtype=torch.bfloat16, compute_dtype=torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_with_cu_seqlens_on_the_host(generator):
    model = InternLM2(TINY, device="cuda", compute_dtype=torch.bfloat16)
    tokens, cu_seqlens = packed(LENGTHS, torch.Generator().manual_seed(0))
    tokens = tokens.cuda()
    model.loss(tokens, tokens, cu_seqlens).backward()  # the first call computes the rotary table
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.loss(tokens, tokens, cu_seqlens).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
