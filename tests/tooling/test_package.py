"""The installed package: what an import needs, its messages where parts are missing, the contents of the archives."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "INTERNLM2_KERNELS_BACKEND")}
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT, env={**clean, **env})


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "rich", "numpy.core") or name == "internlm2_kernels._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else real(name, package)
"""


def test_importing_pulls_in_nothing_heavy():
    """`import internlm2_kernels` imports no Triton, einops, rich, transformers or numpy, beyond what torch imports itself."""
    out = python("import torch, sys; before = set(sys.modules); import internlm2_kernels;"
                 "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))")
    assert out.returncode == 0, out.stderr
    assert not {"triton", "einops", "rich", "transformers", "numpy"} & set(out.stdout.split()), out.stdout


@pytest.mark.slow
def test_importing_costs_little():
    """Under 0.3 s in addition to torch: the median of seven imports, each in a fresh process."""
    code = "import torch, time; t = time.perf_counter(); import internlm2_kernels; print(time.perf_counter() - t)"
    assert sorted(float(python(code).stdout) for _ in range(7))[3] < 0.3


def test_reference_works_without_compiler_triton_and_gpu():
    out = python(WITHOUT + "import torch, internlm2_kernels as k\n"
                 "x = torch.randn(3, 8, requires_grad=True)\n"
                 "k.rms_norm(x, torch.ones(8)).sum().backward(); k.swiglu(x)\n"
                 "print({name: op.usable['cpu'] for name, op in k.OPS.items()})\n"
                 "try: k.rms_norm(x, torch.ones(8), backend='cpp')\n"
                 "except ValueError as error: print(error)\n")
    assert out.returncode == 0, out.stderr
    assert "('reference',)" in out.stdout and "cpp" not in out.stdout.splitlines()[0]
    assert "rms_norm: backend='cpp' cannot run here: the compiled library is not here" in out.stdout


def test_doctor_says_what_is_missing():
    out = python(WITHOUT + "import runpy, sys; sys.argv = ['doctor', 'doctor']\n"
                 "runpy.run_module('internlm2_kernels', run_name='__main__')")
    assert out.returncode == 0, out.stdout + out.stderr
    assert "not loaded: the compiled library is not here" in out.stdout and "all operators are sound" in out.stdout
    assert re.search(r"fresh 64 MiB +[\d.]+ GB/s", out.stdout) and re.search(r"what helps +\w+", out.stdout), out.stdout


def test_doctor_fails_when_an_operator_is_wrong():
    """Where a kernel returns zeros, `doctor` reports the operator's self-test as failed and ends with exit status 1."""
    out = python("import torch, internlm2_kernels\n"
                 "from internlm2_kernels.ops import swiglu\n"
                 "swiglu._FWD['cpp'] = lambda gate, up: torch.zeros_like(gate)\n"
                 "import sys; from internlm2_kernels.__main__ import main; sys.exit(main(['doctor']))")
    assert out.returncode == 1 and re.search(r"swiglu +cpu +cpp +FAILED", out.stdout), out.stdout


@pytest.mark.parametrize("value,code", (("reference", 0), ("metal", 1)))
def test_backend_variable(value, code):
    out = python("import torch, internlm2_kernels as k; y = k.swiglu(torch.randn(2, 4, requires_grad=True));"
                 "print(type(y.grad_fn).__name__)", INTERNLM2_KERNELS_BACKEND=value)
    assert out.returncode == code
    assert "MulBackward" in out.stdout if code == 0 else "INTERNLM2_KERNELS_BACKEND: expected one of" in out.stderr


def test_torchs_own_switch_forces_avx2():
    out = python("import torch; from internlm2_kernels import _C; print(_C.cpu_isa())", ATEN_CPU_CAPABILITY="avx2")
    assert out.stdout.split() == ["avx2"], out.stderr


def test_house_rules():
    """Kernels' implementations import no operator, internlm2_kernels does not import internlm2 (the model), and the docstring
    of every public operator has all its sections.
    """
    import internlm2_kernels
    from tools.docs import section

    for path in (ROOT / "internlm2_kernels").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) internlm2\b(?!_)", text, re.M), f"{path} imports the model"
        if path.parent.name == "_triton":
            assert not re.search(r"from \.\.ops", text), f"{path} imports a contract"
    for name, op in internlm2_kernels.OPS.items():
        for title in ("Shapes", "Backward", "Errors", "Cost"):
            assert section(op, title), name
        assert "Source:" in getattr(internlm2_kernels, name).__doc__
    assert (ROOT / "internlm2_kernels/py.typed").exists()


def test_the_project_speaks_of_itself_alone():
    """No tracked file contains a path of the machine it was written on, or the address of a package registry."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    if not any(files):
        pytest.skip("not a git checkout")
    words = re.compile("|".join(("/wo" + "rk/", "/ro" + "ot/", r"index" + "-url", "pypi" + r"\.org")))
    for name in filter(None, files):
        path = ROOT / name
        if path.suffix in (".png",) or not path.is_file():
            continue
        found = words.search(path.read_text(errors="replace"))
        assert not found, f"{name}: {found.group()}"


@pytest.mark.slow
def test_archives(tmp_path):
    """USE_CPP=0 gives a pure wheel; the sdist holds all that the extension is built from."""
    env = {**os.environ, "USE_CPP": "0"}
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, "."],
                   cwd=ROOT, env=env, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.endswith("py3-none-any.whl") and not any(n.endswith(".so") for n in names)
    for needed in ("internlm2_kernels/py.typed", "internlm2_kernels/_triton/rms_norm.py", "internlm2/recipes/demo.toml"):
        assert needed in names, needed
    metadata = wheel.name.split("-py3")[0] + ".dist-info"
    assert {name.split("/")[0] for name in names} == {"internlm2", "internlm2_kernels", metadata}, "tools/ stays out"
    subprocess.run([sys.executable, "-c", "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])", tmp_path],
                   cwd=ROOT, env=env, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    inside = {n.split("/", 1)[1] for n in tarfile.open(sdist).getnames() if "/" in n}
    tracked = subprocess.run(["git", "ls-files", "csrc"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert set(tracked) | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= inside


def test_an_isolated_build_stops_with_one_sentence(tmp_path):
    """Where torch cannot be imported, as in pip's isolated builds, the build stops with a message; it does not silently become
    pure Python.
    """
    code = ("import sys, importlib.util as u; real = u.find_spec;"
            "u.find_spec = lambda n, p=None: None if n == 'torch' else real(n, p);"
            f"sys.argv = ['setup.py', '-q', 'build_ext', '-b', {str(tmp_path)!r}]; exec(open('setup.py').read(),"
            " {'__file__': 'setup.py', '__name__': '__main__'})")
    out = python(code)
    assert out.returncode == 1 and "use `pip install --no-build-isolation .` with torch installed, or USE_CPP=0." in out.stderr
    assert "Traceback" not in out.stderr
