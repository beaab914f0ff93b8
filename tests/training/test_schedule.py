"""The learning-rate schedule: its values at the ends of warm-up and decay, and its shape between them."""

import math

import pytest

from internlm2.training.schedule import cosine_with_warmup


def rates(peak=2.0, steps=110, warmup=10, floor_ratio=0.1):
    options = dict(peak=peak, steps=steps, warmup=warmup, floor_ratio=floor_ratio)
    return [cosine_with_warmup(s, **options) for s in range(steps + 5)]


def test_corners():
    lr = rates()
    assert lr[0] == pytest.approx(0.2) and lr[9] == lr[10] == 2.0
    assert lr[109] == pytest.approx(0.2) and lr[110:] == [lr[109]] * 5
    # Halfway through the decay the rate is halfway between peak and floor; step 10 + 99 / 2 lies between two steps.
    assert (lr[59] + lr[60]) / 2 == pytest.approx((2.0 + 0.2) / 2)


def test_rises_then_falls():
    lr = rates()
    assert all(b > a for a, b in zip(lr[:10], lr[1:10], strict=False))
    assert all(b < a for a, b in zip(lr[10:109], lr[11:110], strict=True))
    differences = [b - a for a, b in zip(lr[:10], lr[1:10], strict=False)]
    assert max(differences) == pytest.approx(min(differences))


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (2, 1), (5, 5), (5, 50)])
def test_short_runs(steps, warmup):
    assert all(math.isfinite(r) and 0 < r <= 2.0 for r in rates(steps=steps, warmup=warmup))
