"""The operator table of docs/operators.md, made from the registry and the docstrings, between its two markers."""

import inspect
import re
import sys
from pathlib import Path

import internlm2_kernels
from internlm2_kernels._registry import OPS, Op

PAGE = Path(__file__).resolve().parents[1] / "docs" / "operators.md"
BEGIN, END = "<!-- operators: begin (python -m tools.docs --write) -->", "<!-- operators: end -->"


def section(op: Op, title: str) -> str:
    """The text of a section of the operator's public docstring, such as `Shapes:` or `Backward:`, joined into one line."""
    text = inspect.getdoc(getattr(internlm2_kernels, op.name))
    found = re.search(rf"^{title}:\s+(.*?)(?=\n\S|\Z)", text, re.S | re.M)
    if found is None:
        raise ValueError(f"{op.name}: docstring: expected a section {title!r}, got none")
    return re.sub(r"\s+", " ", found.group(1)).strip()


def operator_table() -> str:
    """The Markdown table with one row for each operator, taken from the registry and the docstrings."""
    rows = ["| operator | what it does | backends | dtypes | backward |", "|---|---|---|---|---|"]
    for op in sorted(OPS.values(), key=lambda op: op.name):
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in op.dtypes)
        if "float64" in (inspect.getdoc(op.public).partition("Dtypes:")[2].partition("\nBackward:")[0]):
            dtypes += ", float64"  # op.dtypes are those of the error check, for which float64 is the measure
        backward = section(op, "Backward").split(". ")[0].split(": ")[0].rstrip(".")
        rows.append(f"| `{op.name}` | {op.summary} ({op.source}) | {', '.join(op.backends)} | {dtypes} | {backward} |")
    return "\n".join(rows)


def with_table(page: str) -> str:
    """`page` with the table between its markers replaced."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{PAGE.name}: expected the markers {BEGIN!r} and {END!r} once each")
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{operator_table()}\n{END}{rest.split(END)[1]}"


def main(argv: list[str]) -> int:
    if argv == ["--write"]:
        PAGE.write_text(with_table(PAGE.read_text()))
    elif argv:
        print("usage: python -m tools.docs [--write]\n\n"
              "Prints the operator table, made from the registry and the docstrings. --write puts it between its markers in\n"
              "docs/operators.md. Example: python -m tools.docs --write && git diff docs/operators.md")
        return 0 if argv in (["-h"], ["--help"]) else 2
    else:
        print(operator_table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
