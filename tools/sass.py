"""Reads the machine code (SASS) of a compiled kernel: its loops, and the arithmetic instructions of the hot loop.

A loop is the range of addresses between a backward branch and its target. The hot loop of a kernel is the innermost loop with
the most tensor-core instructions for its length, or with the most float instructions if the kernel has no tensor-core
instructions. Code inside the loop that a branch jumps over is not counted if it has no tensor-core instructions, because it is
rare work, such as the merge of two splits of keys. A kernel without loops is counted as a whole. All counts are static, for
one thread.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

TENSOR = r"[HIQ]G?MMA|UTC\w*MMA"  # mma.sync, wgmma, tcgen05
KINDS = {"tensor": TENSOR, "ffma": r"U?FFMA2?", "fmul_fadd": r"U?F(?:MUL|ADD)2?", "mufu": r"MUFU"}
FLOAT = "|".join(KINDS[kind] for kind in ("ffma", "fmul_fadd", "mufu"))


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # without modifiers: the name of FFMA.FTZ is FFMA
    text: str

    def is_a(self, pattern: str) -> bool:
        return re.fullmatch(pattern, self.name) is not None

    @property
    def lanes(self) -> int:
        """How many elements the instruction computes in a thread: 2 for Blackwell's FFMA2, FMUL2 and FADD2, otherwise 1."""
        return 2 if self.name.endswith("2") and self.name.startswith("F") else 1


@dataclass(frozen=True)
class Loop:
    """Instructions of the hot path of a loop, or of the whole kernel if it has no loop."""

    path: list[Instruction]
    is_loop: bool

    def count(self, pattern: str) -> int:
        return sum(instruction.lanes for instruction in self.path if instruction.is_a(pattern))

    def counts(self) -> dict[str, int]:
        return {"instructions": len(self.path), **{kind: self.count(pattern) for kind, pattern in KINDS.items()}}

    def __str__(self) -> str:
        return " ".join(("loop" if self.is_loop else "all", *map(str, self.counts().values())))

    def bytes_loaded(self) -> int:
        """Bytes that one thread loads from global memory in one pass of the path."""
        loads = [i for i in self.path if i.is_a(r"LDG|LDGSTS")]
        return sum(int(found.group(1)) // 8 if (found := re.search(r"\.(64|128)\b", i.text)) else
                   2 if ".U16" in i.text or ".S16" in i.text else 4 for i in loads)


def disassemble(cuobjdump: str, binary: Path) -> dict[str, list[Instruction]]:
    """The instructions of every function of a cubin or fat binary, by function name."""
    out = subprocess.run([cuobjdump, "-sass", str(binary)], check=True, capture_output=True, text=True).stdout
    return parse(out)


def parse(listing: str) -> dict[str, list[Instruction]]:
    functions = re.split(r"Function\s*:\s*(\S+)", listing)
    if len(functions) == 1:
        functions = ["", "kernel", listing]
    return {name: [Instruction(int(at, 16), _name(text), text)
                   for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", body)]
            for name, body in zip(functions[1::2], functions[2::2], strict=True)}


def _name(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text.strip()).split(".")[0].split()[0]


def _target(instruction: Instruction) -> int | None:
    found = re.search(r"\b0x([0-9a-f]+)\s*$", instruction.text) if instruction.name == "BRA" else None
    return int(found.group(1), 16) if found else None


def innermost_loops(code: list[Instruction], patterns: tuple[str, ...] = (TENSOR, FLOAT, ".*")) -> list[list[Instruction]]:
    """The innermost loops that have the hot instruction: the first of the patterns that occurs in any loop decides which one
    that is."""
    # ptxas moves code that waits to a place behind the last EXIT of a kernel. The branches that jump back from there do not end
    # loops.
    end = max((i.address for i in code if i.text.strip() == "EXIT"), default=code[-1].address)
    ranges = {(target, i.address) for i in code if (target := _target(i)) is not None and target < i.address <= end}
    for pattern in patterns:
        chosen = [r for r in ranges if any(i.is_a(pattern) for i in code if r[0] <= i.address <= r[1])]
        if chosen:
            break
    else:
        return []
    inner = [a for a in chosen if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in chosen)]
    return [[i for i in code if first <= i.address <= last] for first, last in sorted(inner)]


def hot_path(loop: list[Instruction]) -> list[Instruction]:
    """The instructions of the loop without those that a forward branch jumps over. These stay if they contain tensor-core
    instructions or make up half of the loop."""
    if not any(i.is_a(TENSOR) for i in loop):
        return loop
    skipped_to, path = 0, []
    for instruction in loop:
        if instruction.address < skipped_to:
            continue
        path.append(instruction)
        target = _target(instruction)
        if target is not None and instruction.address < target <= loop[-1].address:
            jumped = [i for i in loop if instruction.address < i.address < target]
            if 2 * len(jumped) < len(loop) and not any(i.is_a(TENSOR) for i in jumped):
                skipped_to = target
    return path


def hot_loop(code: list[Instruction]) -> Loop:
    loops = [Loop(hot_path(loop), True) for loop in innermost_loops(code)]
    if not loops:
        return Loop(code, False)
    return max(loops, key=lambda loop: (loop.count(TENSOR) / len(loop.path), loop.count(FLOAT)))


def spills_in_loops(code: list[Instruction]) -> int:
    """The number of stack accesses in the innermost loops with products, where register spills cost the most time."""
    return sum(i.is_a("STL|LDL") for loop in innermost_loops(code, (TENSOR, KINDS["ffma"], ".*")) for i in loop)
