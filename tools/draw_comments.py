"""python -m tools.draw_comments: comments and docstrings drawn at random, for a reader who judges their clarity.

    python -m tools.draw_comments                          40 of them, from the whole tree
    python -m tools.draw_comments --count 15 --seed 7      another draw
    python -m tools.draw_comments --under csrc/cpu         of one folder only

Each is printed with its place and the lines of code around it. The same seed on the same tree draws the same ones.
"""

import argparse
import ast
import io
import random
import re
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON, C, HASH = (".py",), (".h", ".cpp", ".cu", ".cuh"), (".toml", ".sh", ".yml", ".yaml")
CONTEXT = 4  # lines of code after the comment
FEWEST_WORDS = 4  # shorter ones are labels
NO_PROSE = re.compile(r"(#|//) ?(---|===|namespace |fmt: |type: |noqa)|#!")  # rules between sections, closers, marks for tools
C_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|(//[^\n]*)|(/\*.*?\*/)', re.S)


@dataclass(frozen=True)
class Comment:
    """One comment or docstring: the lines from `first` to `last` of `path`, both included."""

    path: Path
    first: int
    last: int
    text: str


def python_comments(path: Path, source: str) -> list[Comment]:
    """All comments of a Python file, found by the tokenizer, and its docstrings, found in the syntax tree."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found.append(Comment(path, token.start[0], token.start[0], token.string))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            literal = node.body[0].value
            found.append(Comment(path, literal.lineno, literal.end_lineno, literal.value))
    return found


def c_comments(path: Path, source: str) -> list[Comment]:
    """All comments of a C or C++ file; what looks like one inside a string or character literal is left out."""
    found = []
    for match in C_COMMENT.finditer(source):
        text = match.group(1) or match.group(2)
        if text:
            first = source.count("\n", 0, match.start()) + 1
            found.append(Comment(path, first, first + text.count("\n"), text))
    return found


def hash_comments(path: Path, source: str) -> list[Comment]:
    lines = enumerate(source.splitlines(), 1)
    return [Comment(path, number, number, line.strip()) for number, line in lines if line.lstrip().startswith("#")]


def joined(comments: list[Comment], lines: list[str]) -> list[Comment]:
    """Merges comments on consecutive lines into one. A comment behind code on the same line stays separate."""
    result: list[Comment] = []
    alone = lambda comment: lines[comment.first - 1].strip().startswith(comment.text.split("\n")[0][:2])
    for comment in sorted(comments, key=lambda comment: comment.first):
        if result and result[-1].last + 1 == comment.first and alone(comment) and alone(result[-1]):
            previous = result.pop()
            comment = Comment(comment.path, previous.first, comment.last, f"{previous.text}\n{comment.text}")
        result.append(comment)
    return result


def files(under: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", under], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines()]


def comments_of(path: Path) -> list[Comment]:
    reader = {**dict.fromkeys(PYTHON, python_comments), **dict.fromkeys(C, c_comments),
              **dict.fromkeys(HASH, hash_comments)}.get(path.suffix)
    if path.name == "Makefile" or path.parent.name == ".ci":
        reader = hash_comments
    if reader is None or not path.is_file():
        return []
    source = path.read_text()
    prose = [comment for comment in reader(path, source) if not NO_PROSE.match(comment.text)]
    found = joined(prose, source.splitlines())
    return [comment for comment in found if len(re.findall(r"[A-Za-z]{2,}", comment.text)) >= FEWEST_WORDS]


def shown(comment: Comment) -> str:
    """The place, then the comment marked by > with what stands before and after it."""
    lines = comment.path.read_text().splitlines()
    first, last = max(1, comment.first - 1), min(len(lines), comment.last + CONTEXT)
    body = "\n".join(f"{'>' if comment.first <= n <= comment.last else ' '} {lines[n - 1]}" for n in range(first, last + 1))
    return f"{comment.path.relative_to(ROOT)}:{comment.first}\n{body}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.draw_comments", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--under", default=".", help="only files below this folder")
    args = parser.parse_args(argv)
    every = [comment for path in files(args.under) for comment in comments_of(path)]
    drawn = random.Random(args.seed).sample(every, min(args.count, len(every)))
    print(f"{len(drawn)} of {len(every)} comments and docstrings, seed {args.seed}\n")
    for number, comment in enumerate(drawn, 1):
        print(f"--- {number}. {shown(comment)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
