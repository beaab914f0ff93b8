"""The learning-rate schedule. It depends on the step alone, so that a resumed run needs no state of it."""

import math


def cosine_with_warmup(step: int, *, peak: float, steps: int, warmup: int, floor_ratio: float = 0.1) -> float:
    """The learning rate of a step, counted from 0: a linear rise over the warm-up, then half a cosine down to the floor.

    lr = peak (step + 1) / warmup                                                     for step < warmup
    lr = peak (r + (1 - r) (1 + cos(pi p)) / 2),  p = (step - warmup) / (steps - 1 - warmup),  r = floor_ratio  after

    The learning rate of the first step is above 0, that of steps warmup - 1 and warmup is the peak, and that of the last step
    and of any step after it is the floor, peak * floor_ratio.
    Source: arXiv:1608.03983 eq. 5 without restarts; floor_ratio 0.1 as in arXiv:2403.17297 section 3.2.2.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return peak * (floor_ratio + (1 - floor_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
