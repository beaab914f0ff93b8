"""The reward model learns preferences with the kernels, and PPO's actor and critic learn which tokens are rewarded."""

import dataclasses

import pytest
import torch

from internlm2.config import PRESETS
from internlm2.model import InternLM2
from internlm2.reward import RewardModel
from internlm2.training.stages.ppo import gather_experience, policy_loss, value_loss
from internlm2_kernels import FusedAdamW

TINY = dataclasses.replace(PRESETS["tiny"], vocab_size=32)
PROMPT, RESPONSE, SEQUENCES, PAID = 3, 5, 24, TINY.vocab_size // 8  # tokens below PAID are rewarded


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def pairs(generator, count=8):
    """Sequences of random tokens: chosen ones end with token 1, rejected ones with token 2."""
    lengths = torch.randint(1, 9, (2 * count,), generator=generator).tolist()
    cu = bounds(lengths)
    tokens = torch.randint(3, TINY.vocab_size, (sum(lengths),), generator=generator)
    tokens[cu[1:].long() - 1] = torch.arange(2 * count) % 2 + 1
    return tokens, cu


def test_the_reward_model_learns_a_preference(generator):
    model = RewardModel(TINY, compute_dtype=torch.bfloat16)
    assert model.state_dict()["v_head.weight"].shape == (1, TINY.hidden_size) and not hasattr(model, "output")
    optimizer = FusedAdamW(model.parameters(), lr=3e-3, weight_decay=0.0, max_grad_norm=1.0)
    losses = []
    for _ in range(30):
        loss, _ = model.loss(*pairs(generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1, losses
    with torch.no_grad():
        rewards = model.rewards(*pairs(generator, 32))
    assert (rewards[0::2] > rewards[1::2]).all() and rewards.abs().max() < 5


def test_a_reward_is_the_value_at_the_last_token_and_alone_in_its_sequence(generator):
    model = RewardModel(TINY, dtype=torch.float64)
    tokens, cu = pairs(generator, 3)
    _, rewards = model.loss(tokens, cu)
    torch.testing.assert_close(model.values(tokens, cu)[cu[1:].long() - 1], rewards, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.rewards(tokens, cu), rewards, rtol=1e-12, atol=1e-12)
    for i, (begin, end) in enumerate(zip(cu[:-1], cu[1:], strict=True)):
        alone = model.rewards(tokens[begin:end], bounds([end - begin]))
        torch.testing.assert_close(alone[0], rewards[i], rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="empty"):
        model.rewards(tokens, torch.cat((cu, cu[-1:])))


def test_log_probabilities_are_those_of_the_logits(generator):
    model = InternLM2(TINY, dtype=torch.float64)
    tokens, cu = pairs(generator)
    got, entropy = model.logprobs(tokens, tokens.flip(0), cu, temperature=0.7, return_entropy=True)
    want = (model(tokens, cu) / 0.7).log_softmax(-1)
    torch.testing.assert_close(got, want.gather(1, tokens.flip(0)[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(want.exp() * want).sum(-1))


@torch.no_grad()
def rollout(actor, generator):
    """(tokens, cu_seqlens, mask, scores) of random prompts with the actor's responses. The mask marks the choices of the
    actor."""
    rows = torch.randint(TINY.vocab_size, (SEQUENCES, PROMPT), generator=generator)
    for _ in range(RESPONSE):
        cu = bounds([rows.shape[1]] * SEQUENCES)
        logits = actor(rows.flatten(), cu).float().view(SEQUENCES, -1, TINY.vocab_size)[:, -1]
        rows = torch.cat((rows, torch.multinomial(logits.softmax(-1), 1, generator=generator)), 1)
    mask = torch.zeros(rows.shape, dtype=torch.bool)
    mask[:, PROMPT - 1: -1] = True
    return rows.flatten(), bounds([rows.shape[1]] * SEQUENCES), mask.flatten(), (rows[:, PROMPT:] < PAID).float().mean(1)


def test_an_actor_learns_what_it_is_paid_for(generator):
    """20 rounds of a rollout and 2 epochs of PPO raise the share of rewarded tokens among all choices from 1/8 to more than
    0.6."""
    actor, reference = (InternLM2(TINY, compute_dtype=torch.bfloat16) for _ in range(2))
    critic = RewardModel(TINY, compute_dtype=torch.bfloat16)
    steps = [(actor, FusedAdamW(actor.parameters(), lr=2e-3, weight_decay=0.0, max_grad_norm=1.0)),
             (critic, FusedAdamW(critic.parameters(), lr=2e-3, weight_decay=0.0, max_grad_norm=1.0))]
    scores, kls = [], []
    for _ in range(20):
        experience = gather_experience(actor, reference, critic, *(batch := rollout(actor, generator)))
        scores.append(float(batch[-1].mean()))
        kls.append(float(experience.kl))
        for epoch in range(2):
            for model, optimizer in steps:
                loss, stats = (policy_loss if model is actor else value_loss)(model, experience)
                if epoch == 0 and model is actor:  # the log-probabilities have the rollout's bits, so every ratio is 1
                    assert stats["clip_fraction"] == 0 and stats["approx_kl"] == 0
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    print(scores, kls)
    assert scores[0] < 0.25 and sum(scores[-3:]) / 3 > 0.6, scores
    assert kls[0] == 0 and kls[-1] > 0
    assert stats["explained_variance"] > 0  # of the critic's last step


@pytest.mark.parametrize("temperature", (1.0, 0.6))
def test_experience_is_the_definition(temperature, generator):
    """The advantages and returns of gather_experience equal those of a plain loop in float64. Every third response is
    truncated."""
    actor, reference = (InternLM2(TINY, dtype=torch.float64, seed=seed) for seed in (0, 1))
    critic = RewardModel(TINY, dtype=torch.float64)
    tokens, cu, mask, scores = rollout(actor, generator)
    truncated = torch.arange(SEQUENCES) % 3 == 0
    found = gather_experience(actor, reference, critic, tokens, cu, mask, scores, temperature=temperature, truncated=truncated,
                              kl_coef=0.1, gamma=0.9, lam=0.8)
    logits = [(model(tokens, cu) / temperature).log_softmax(-1).detach() for model in (actor, reference)]
    values = critic.values(tokens, cu).detach()
    for i in range(SEQUENCES):
        begin, end = int(cu[i]), int(cu[i + 1])
        after, advantage = values[end - 1] if truncated[i] else 0.0, 0.0  # the value of the state after the last choice
        for t in range(end - 2, begin + PROMPT - 2, -1):
            reward = -0.1 * (logits[0][t, tokens[t + 1]] - logits[1][t, tokens[t + 1]]) + (scores[i] if t == end - 2 else 0)
            advantage = reward + 0.9 * after - values[t] + 0.9 * 0.8 * advantage
            after = values[t]
            torch.testing.assert_close(found.advantages[t], advantage, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(found.returns[t], advantage + values[t], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(found.logprobs[t], logits[0][t, tokens[t + 1]], rtol=1e-9, atol=1e-9)
    # The loss uses the same temperature: for an actor that has not changed every ratio is exactly 1.
    _, statistics = policy_loss(actor, found)
    assert statistics["approx_kl"] == 0 and statistics["clip_fraction"] == 0


def test_a_truncated_response_ends_before_the_sequence_does(generator):
    """Tokens such as a reward token may follow the actor's last choice. A truncated response is then continued by the value of
    the state after that choice, which is not the sequence's last state."""
    actor, critic = InternLM2(TINY, dtype=torch.float64), RewardModel(TINY, dtype=torch.float64)
    tokens, cu, mask, scores = rollout(actor, generator)
    mask = mask.clone()
    mask[cu[1:].long() - 2] = False
    options = dict(kl_coef=0.0, gamma=0.9, lam=0.8)
    values = critic.values(tokens, cu).detach()
    last = cu[1:].long() - 3
    for truncated, follows in ((torch.ones(SEQUENCES, dtype=torch.bool), values[last + 1]), (None, torch.zeros(SEQUENCES))):
        found = gather_experience(actor, actor, critic, tokens, cu, mask, scores, truncated=truncated, **options)
        torch.testing.assert_close(found.advantages[last], scores + 0.9 * follows.double() - values[last], rtol=1e-9, atol=1e-9)


def test_experience_of_no_sequence(generator):
    """A rank without sequences gets empty vectors and a kl of 0, and no NaN."""
    actor, critic = InternLM2(TINY), RewardModel(TINY)
    tokens, mask = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool)
    found = gather_experience(actor, actor, critic, tokens, bounds([]), mask, torch.empty(0))
    assert found.kl == 0 and found.kl.shape == () and found.advantages.shape == found.returns.shape == (0,)


@pytest.mark.parametrize("kl_coef", (float("nan"), float("inf"), "0.1", True))
def test_a_coefficient_that_is_no_number_is_refused(kl_coef, generator):
    actor, critic = InternLM2(TINY), RewardModel(TINY)
    with pytest.raises(ValueError, match="kl_coef must be a finite number, got"):
        gather_experience(actor, actor, critic, *rollout(actor, generator), kl_coef=kl_coef)


def test_lists_are_refused(generator):
    actor, critic = InternLM2(TINY), RewardModel(TINY)
    sound = rollout(actor, generator)
    for place, name in enumerate(("tokens", "cu_seqlens", "mask", "scores")):
        lists = [x.tolist() if i == place else x for i, x in enumerate(sound)]
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            gather_experience(actor, actor, critic, *lists)


@pytest.mark.parametrize("spoil,message", (
    (lambda r: (r[0], r[1], r[2].int(), r[3]), "mask must be bool"),
    (lambda r: (*r, torch.ones(3, dtype=torch.bool)), r"truncated must be bool \[24\], got torch.bool \[3\]"),
    (lambda r: (*r, torch.ones(SEQUENCES)), r"truncated must be bool \[24\], got torch.float32 \[24\]"),
    (lambda r: (r[0], r[1], r[2], r[3][:-1]), "scores must be .*one for each sequence"),
    (lambda r: (r[0], r[1], torch.ones_like(r[2]), r[3]), "after which nothing was chosen"),
    (lambda r: (r[0], r[1], torch.zeros_like(r[2]), r[3]), "got none in sequence 0"),
))
def test_a_wrong_rollout_is_refused(spoil, message, generator):
    actor, critic = InternLM2(TINY), RewardModel(TINY)
    *sound, truncated = (*spoil(rollout(actor, generator)), None)[:5]
    with pytest.raises(ValueError, match=message):
        gather_experience(actor, actor, critic, *sound, truncated=truncated)
