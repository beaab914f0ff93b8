"""What the workloads of reward_loss and reward_loss_from_last share."""

import torch

from ..ops._reward import MARGIN
from . import Sample


def sample_of(packed):
    def sample(case, dtype, device, generator):
        pairs, cols = case.dims["pairs"], case.dims["cols"]
        lengths = torch.randint(1, 2 * case.dims.get("length", 1), (2 * pairs,), generator=generator, device=device)
        cu = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(torch.int32)
        draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)
        hidden = draw(int(cu[-1]) if packed else 2 * pairs, cols).to(dtype)
        head_weight = (case.dims.get("spread", 1) * draw(cols) * cols**-0.5).to(dtype)
        options = {"gamma": case.dims["gamma"]} if "gamma" in case.dims else {}
        inputs = {"hidden" if packed else "last_hidden": hidden, "head_weight": head_weight}
        return Sample(inputs | ({"cu_seqlens": cu} if packed else {}) | options, tuple(inputs))

    return sample


def _magnitude(sample, upstream):
    """The size of the terms that cancel in each output and gradient, by name: the error ladder (testing.py) takes it as the
    scale of the allowed error where it is larger than the result itself.

    A reward is a sum over the hidden size, with terms of both signs. The second derivatives of the losses multiply the errors
    of the rewards; the largest is that of the log barrier near its bound, at distance `near`.
    """
    hidden = next(iter(sample.inputs.values()))
    weight, cu = sample.inputs["head_weight"], sample.inputs.get("cu_seqlens")
    if not hidden.numel():
        return {}
    last = hidden if cu is None else hidden[cu[1:].long() - 1]
    size, typical = float((last.abs() @ weight.abs()).max()), float((last.square() @ weight.square()).max().sqrt())
    near = float((5 - (last @ weight).abs().clamp(max=5 - MARGIN)).min())
    sizes = {"rewards": size, "loss": size * (1 + 0.02 / near)}
    if upstream:
        slope = 1 / len(last) * (1 + 0.02 / near + typical * (0.5 + 0.02 / near**2))
        each = float(upstream["loss"].abs()) * slope + float(upstream["rewards"].abs().max())
        sizes |= {"d_hidden": each * float(weight.abs().max()), "d_last_hidden": each * float(weight.abs().max()),
                  "d_head_weight": each * float(last.square().sum(0).sqrt().max())}
    return sizes


def _bytes(dims, size, direction):
    return 2 * dims["pairs"] * dims["cols"] * size * (1 if direction == "forward" else 2) + dims["cols"] * size


SHARED = dict(bytes=_bytes, magnitude=_magnitude, rowwise=False,
              flops=lambda dims, direction: (4 if direction == "forward" else 8) * dims["pairs"] * dims["cols"])
