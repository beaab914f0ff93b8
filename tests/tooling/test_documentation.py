"""README.md and docs/: the examples run as written, the links lead somewhere, what is generated is up to date."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/NOTES.md",
         ROOT / "benchmarks/results/README.md"]
EXAMPLES = re.findall(r"## (\w+)\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_readme_has_an_example_of_each_part():
    assert [title for title, _ in EXAMPLES] == ["Kernels", "Model", "Training"]


def test_the_examples_run_as_they_are_written(tmp_path):
    """Each example runs in a namespace of its own, but all in one process, since importing torch takes longer than most of
    them.
    """
    pytest.importorskip("sentencepiece", reason="model and training need the extra `model`")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    code = "\n".join(f"exec(compile({code!r}, 'README.md, {title}', 'exec'), {{}})" for title, code in EXAMPLES)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_modes_and_commands_that_the_readme_names_exist():
    text, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (\w+)", text)):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_paths_that_the_pages_name_exist():
    """Every path in backticks that begins with one of the project's folders must exist."""
    folders = "|".join(("csrc", "internlm2_kernels", "internlm2", "benchmarks", "tools", "tests", "docs"))
    for page in PAGES:
        for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text()):
            if not re.search("NAME|DEVICE", path):
                assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_the_operator_table_is_up_to_date():
    from tools.docs import PAGE, with_table

    assert with_table(PAGE.read_text()) == PAGE.read_text(), "stale: run `make docs`"


def test_comments_are_drawn_from_all_languages_with_their_place(tmp_path):
    from tools import draw_comments as tool

    (tmp_path / "a.py").write_text('x = "# not a comment at all here"  # the first comment of four words\n\n\ndef f():\n'
                                   '    """Says what the function does.\n\n    And more.\n    """\n    # two lines that are\n'
                                   '    # one comment together\n    return 1  # short\n')
    (tmp_path / "b.cpp").write_text('// one comment that fills\n// two lines of text\nconst char* s = "// no comment";\n'
                                    '/* and a block\n   of several more words */\nint x;  // behind the code it stands\n')
    places = lambda name: [(c.first, c.last) for c in tool.comments_of(tmp_path / name)]
    assert places("a.py") == [(1, 1), (5, 8), (9, 10)] and places("b.cpp") == [(1, 2), (4, 5), (6, 6)]
    command = [sys.executable, "-m", "tools.draw_comments", "--count", "5", "--seed", "2", "--under", "tools"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    drawn = re.findall(r"^--- \d+\. (\S+):(\d+)$", done, re.M)
    assert len(drawn) == 5
    for name, line in drawn:
        marked = re.search(rf"{re.escape(name)}:{line}\n(?: .*\n)?> (.*)", done).group(1)
        assert marked == (ROOT / name).read_text().splitlines()[int(line) - 1]
