"""What the workloads of PPO's two losses share."""

import torch

from . import Sample, Workload


def masked_workload(vectors, draw, **own):
    """The workload of a loss of several vectors [tokens], named in `vectors`. Only the first of them requires a gradient. The
    mask, which selects the tokens that count, is drawn at random.

    draw(normal) returns the vectors; normal(size) returns a vector of normal random numbers with standard deviation `size`.
    `own` are the other fields of `Workload`.
    """
    def sample(case, dtype, device, generator):
        targets, options = case.dims["targets"], {"clip": case.dims["clip"]} if "clip" in case.dims else {}
        drawn = draw(lambda size: size * torch.randn(targets, generator=generator, device=device))
        mask = torch.rand(targets, generator=generator, device=device) < case.dims.get("counted", 0.7)
        inputs = {name: x.to(dtype) for name, x in zip(vectors, drawn, strict=True)}
        return Sample({**inputs, "mask": mask, **options}, vectors[:1])

    return Workload(
        sample=sample,
        batched=(*vectors, "mask"),
        bytes=lambda dims, size, direction: dims["targets"] * ((3 if direction == "forward" else 4) * size + 1),
        rowwise=False,
        domain={"targets": (0, 300, 1)},
        **own,
    )
