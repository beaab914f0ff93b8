"""Reads gates.toml, which says for each operator what counts as done, and judges a row by it."""

import fnmatch
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from . import setting
from .names import size_of

GATES = Path(__file__).with_name("gates.toml")
WHERE = ("device", "op", "direction", "dtype")
RATIOS = ("eager", "compile", "liger", "flex", "mask", "folded", "bf16 cache", "sequence", "cudnn", "flash",
          "efficient", "varlen")
# Peers that are not installed everywhere, or too slow to be timed at every size: where they were not timed, no gate is missed.
OPTIONAL = ("liger", "mask", "cudnn", "flash", "efficient", "varlen")
SHARES = {"bw": "copy_fraction", "read": "read_fraction", "roof": "limit_fraction"}
AT_LIMIT = 0.85  # a row that reaches this fraction of what the machine allows is "at the limit"


@dataclass(frozen=True)
class Verdict:
    """One demand of a gate on one row.

    what    a family of peers, or a share (a key of SHARES)
    need    the demanded value; got: the measured one, None where it could not be measured
    limit   the row's `limit_fraction` divided by the fraction that counts as being at the machine's limit (AT_LIMIT, or the
            gate's own): from 1 on a demanded ratio counts as met, since no implementation could be much faster
    """

    what: str
    need: float
    got: float | None
    limit: float = 0.0

    @property
    def reached(self) -> bool:
        """Whether the number that the gate asks for was measured."""
        return self.got is not None and self.got >= self.need

    @property
    def met(self) -> bool:
        return self.reached or self.limit >= 1

    @property
    def margin(self) -> float:
        """The measured value divided by the demanded one, or `limit` where that is larger: below 1 the gate is missed."""
        return max(0.0 if self.got is None else self.got / self.need, self.limit)


@functools.cache
def settings() -> dict[str, Any]:
    """The lists of operators at the head of gates.toml."""
    return {key: value for key, value in tomllib.loads(GATES.read_text()).items() if key != "gate"}


def load(path: Path = GATES) -> list[dict]:
    gates = tomllib.loads(path.read_text())["gate"]
    for gate in gates:
        unknown = set(gate) - {*WHERE, *RATIOS, *SHARES, "size", "limit", "memory"}
        missing = set(WHERE[:3]) - set(gate)
        if unknown or missing:
            raise ValueError(f"{path.name}: gate {gate}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}")
        if gate.get("memory", setting.KEPT) not in setting.WORDS:
            raise ValueError(f"{path.name}: gate {gate}: memory: expected one of {', '.join(setting.WORDS)}")
    return gates


def judge(row: dict, gates: list[dict]) -> list[Verdict]:
    """The verdicts on a row (`suite.Row` as a dict). A peer that is not installed on this machine is not demanded, and nothing
    is demanded in a setting of CPU memory that is not in `setting.GATED`, unless the gate names it.

    In old records the copy yardstick wrote to fresh memory, so that it measured page faults too. Their rows are judged only by
    their ratios to peers and by the read rate, which was measured then as it is now.
    """
    verdicts = []
    for gate in gates:
        if any(key in gate and gate[key] != row[key] for key in WHERE):
            continue
        memory = row.get("memory", "")
        if memory != gate["memory"] if "memory" in gate else memory not in setting.GATED:
            continue
        if "size" in gate and not fnmatch.fnmatchcase(size_of(row["dims"]), gate["size"]):
            continue
        limit = row.get("limit_fraction")
        came = 0.0 if limit is None else limit / gate.get("limit", AT_LIMIT)
        for what in RATIOS:
            if what in gate and (what in row["against"] or what not in OPTIONAL):
                got = row["against"].get(what)
                verdicts.append(Verdict(what, gate[what], got["ratio"][0] if got else None, came))
        verdicts += [Verdict(share, gate[share], row.get(name)) for share, name in SHARES.items()
                     if share in gate and ("limit_fraction" in row or share == "read")]
    return verdicts
