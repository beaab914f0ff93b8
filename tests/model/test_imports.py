"""The modules of the package import each other in one direction only; imports inside functions count too."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import internlm2

ROOT = Path(internlm2.__file__).parent
FILES = {".".join(f.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): f for f in ROOT.rglob("*.py")}
ABOVE = ("internlm2.cli", "internlm2.demo", "internlm2.__main__")  # only these may import each other


def imported_by(module):
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in FILES else node.module for name in named}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & set(FILES)) - {module}


def test_no_circle():
    order = list(TopologicalSorter({module: imported_by(module) for module in FILES}).static_order())  # CycleError otherwise
    assert len(order) == len(FILES) > 20


def test_arrows_point_down():
    for module in FILES:
        for target in imported_by(module):
            assert not target.startswith(ABOVE) or module.startswith(ABOVE), f"{module} imports {target}"
            shared = module.startswith("internlm2.training.") and not module.startswith("internlm2.training.stages")
            assert not (shared and target.startswith("internlm2.training.stages")), f"{module} knows the stage {target}"
            if module.startswith("internlm2.data"):
                assert target.startswith("internlm2.data"), f"{module}, which knows no model, imports {target}"
