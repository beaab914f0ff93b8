"""The command line: python -m internlm2 demo | train | demo-check."""

import argparse
import sys
from collections.abc import Sequence

EXAMPLES = """examples:
  python -m internlm2 demo                           train a small model, in under 4 minutes on two CPU cores
  python -m internlm2 demo --device cuda             the same on a GPU
  python -m internlm2 train internlm2/recipes/tiny.toml
  python -m internlm2 train internlm2/recipes/tiny.toml out=runs/mine data.source=my_texts optimizer.lr=1e-3
  python -m internlm2 demo-check                     do the kernels learn as plain PyTorch operators do?
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m internlm2", description="Train InternLM2 models.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train a small model beside plain PyTorch, and report")
    demo.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    demo.add_argument("--out", default="runs/demo", help="folder of the run (default %(default)s)")
    demo.add_argument("--minutes", type=float, default=3.4, help="time to spend in all (default %(default)s)")

    train = commands.add_parser("train", help="train from a recipe; continues a run that was stopped")
    train.add_argument("recipe", help="a TOML file, for instance internlm2/recipes/tiny.toml")
    train.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the recipe's")

    check = commands.add_parser("demo-check", help="compare the losses of kernels and plain operators over whole runs")
    check.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    check.add_argument("--out", default="runs/demo-check", help="folder of the runs (default %(default)s)")
    check.add_argument("--steps", type=int, default=150, help="steps of each bfloat16 run (default %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 done, 1 failed, 2 wrong usage or input, 128 + n stopped by signal n."""
    arguments = _parser().parse_args(argv)
    try:
        # Imported here and not above, so that --help does not wait for torch.
        if arguments.command == "train":
            return _train(arguments)
        _keep_memory(arguments.device)
        if arguments.command == "demo":
            from internlm2.demo.run import demo

            return demo(arguments.device, arguments.out, arguments.minutes)
        from internlm2.demo.agreement import check

        return check(arguments.device, arguments.out, arguments.steps)
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _keep_memory(device: str) -> None:
    """Makes this process keep freed CPU memory, and says so. A process that computes on a GPU has no large CPU tensors."""
    if device == "cpu":
        from internlm2_kernels import memory

        print(memory.keep_freed_memory())


def _train(arguments: argparse.Namespace) -> int:
    from internlm2.config import load_config
    from internlm2.training.config import TrainConfig
    from internlm2.training.stages.pretrain import run
    from internlm2.training.trainer import exit_status

    config = load_config(TrainConfig, arguments.recipe, arguments.overrides)
    _keep_memory(config.device)
    return exit_status(run(config))
