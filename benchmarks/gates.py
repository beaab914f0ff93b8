"""What counts as done: gates.toml, and the verdict of a row by it."""

import fnmatch
import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from .suite import size_of

GATES = Path(__file__).with_name("gates.toml")
WHERE = ("device", "op", "direction", "dtype")
RATIOS = ("eager", "compile", "liger", "flex", "mask", "folded", "bf16 cache", "sequence", "cudnn", "flash",
          "efficient", "varlen")
# Not installed everywhere, or too slow to be timed at every size.
OPTIONAL = ("liger", "mask", "cudnn", "flash", "efficient", "varlen")
SHARES = {"bw": "copy_fraction", "read": "read_fraction", "roof": "roof_fraction"}


@dataclass(frozen=True)
class Verdict:
    """One demand on one row: `what` is a family of peers or a share; `got` is None where it could not be measured."""

    what: str
    need: float
    got: float | None

    @property
    def met(self) -> bool:
        return self.got is not None and self.got >= self.need

    @property
    def margin(self) -> float:
        """Measured over demanded: under 1 is missed."""
        return 0.0 if self.got is None else self.got / self.need


def load(path: Path = GATES) -> list[dict]:
    gates = tomllib.loads(path.read_text())["gate"]
    for gate in gates:
        unknown = set(gate) - {*WHERE, *RATIOS, *SHARES, "size"}
        missing = set(WHERE[:3]) - set(gate)
        if unknown or missing:
            raise ValueError(f"{path.name}: gate {gate}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}")
    return gates


def judge(row: dict, gates: list[dict]) -> list[Verdict]:
    """The verdicts on a row (`suite.Row` as a dict). A peer that is not installed here is no demand."""
    verdicts = []
    for gate in gates:
        if any(key in gate and gate[key] != row[key] for key in WHERE):
            continue
        if "size" in gate and not fnmatch.fnmatchcase(size_of(row["dims"]), gate["size"]):
            continue
        for what in RATIOS:
            if what in gate and (what in row["against"] or what not in OPTIONAL):
                got = row["against"].get(what)
                verdicts.append(Verdict(what, gate[what], got["ratio"][0] if got else None))
        verdicts += [Verdict(share, gate[share], row.get(name)) for share, name in SHARES.items() if share in gate]
    return verdicts
