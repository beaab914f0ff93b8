"""The static audit of GPU kernels: every kernel is in it, and each of its rules can fail."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import internlm2_kernels
from internlm2_kernels import OPS
from tools import audit, audit_rules, compile_kernels, sass

pytest.importorskip("triton")
PACKAGE = Path(internlm2_kernels.__file__).parent
TRITON_OPS = [name for name, op in OPS.items() if "triton" in op.backends]


def run(*command):
    """Runs Python in a process whose Triton is the compiler and not the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=PACKAGE.parent)


# Kernels that run for 16-bit inputs only, of which the audit compiles bfloat16.
ONE_DTYPE = {"linear_head_product_kernel": "bfloat16", "linear_head_peak_kernel": "bfloat16"}
# For each pass, words of which the names of its kernels contain one.
WORDS = {"bwd": ("bwd", "gradient", "scale"), "fwd": ("fwd", "merge", "chunks"), "step_": ("step",)}


def kernels_of(path: Path) -> set[str]:
    """The kernels of a file: functions decorated with `triton.jit` whose name does not begin with an underscore."""
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
            and any("jit" in ast.unparse(d) for d in node.decorator_list) and not node.name.startswith("_")}


def test_every_kernel_is_launched():
    """Every kernel of the package is launched in every dtype that its operator takes, and every pass launches something."""
    code = ("import json, sys; from tools import compile_kernels as a\n"
            "print(json.dumps([x.key for op in sys.argv[1:] for dtype in a.DTYPES for x in a.launches(op, dtype)]))")
    out = run("-c", code, *TRITON_OPS)
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    for path in (PACKAGE / "_triton").glob("*.py"):
        for kernel in kernels_of(path):
            assert kernel.endswith("_kernel"), f"{kernel}: a kernel's name ends in _kernel, a device function's begins with _"
            ops = [path.stem] if path.stem in OPS else TRITON_OPS  # a file of several operators, such as losses.py
            dtypes = ("bfloat16", "float32") if len(OPS[ops[0]].dtypes) > 1 else ("float32",)
            for dtype in (ONE_DTYPE[kernel],) if kernel in ONE_DTYPE else dtypes:
                mine = [key for key in found if key.split("/")[0] in ops and key.split("/")[1] == kernel]
                assert any(key.endswith(f"/{dtype}") for key in mine), f"{kernel} {dtype}: launch it in tools/audited.py"
    for name in TRITON_OPS:
        for pass_name in OPS[name].schemas:
            words = WORDS[next(word for word in WORDS if word in pass_name)]
            own = [key.split("/")[1] for key in found if key.startswith(f"{name}/")]
            assert any(word in kernel for kernel in own for word in words), (name, pass_name)


GOOD = {"registers": 40, "stack_bytes": 0, "spills_in_loops": 0, "shared_bytes": 1000, "mma": 4, "wgmma": 0, "tcgen05": 0,
        "loads": "4x128 1x32", "stores": "2x128", "source": "x"}


@pytest.mark.parametrize("key,changes,word", (
    ("swiglu/swiglu_fwd_kernel/x/bfloat16/sm_80", {"loads": "1x128 9x32"}, "loads are 16 bytes wide"),
    ("swiglu/swiglu_fwd_kernel/x/bfloat16/sm_80", {"stores": "9x16"}, "stores are 16 bytes wide"),
    ("flash_attention/flash_attention_fwd_kernel/x/bfloat16/sm_80", {"mma": 0}, "expected mma alone"),
    ("flash_attention/flash_attention_fwd_kernel/x/bfloat16/sm_90", {"wgmma": 1}, "expected wgmma alone"),
    ("linear_logprobs/linear_head_fwd_kernel/x/bfloat16/sm_100", {}, "do not use tcgen05")))
def test_broken_rules_are_found(key, changes, word):
    (line,) = audit_rules.problems({key: {**GOOD, **changes}})
    assert key in line and word in line


def test_rules_that_are_kept():
    assert audit_rules.problems({f"swiglu/swiglu_fwd_kernel/x/{dtype}/sm_80": {**GOOD, "loads": loads} for dtype, loads in (
        ("bfloat16", "4x128 1x32"), ("float32", "9x32"))}) == []
    assert audit_rules.problems({"op/kernel/x/float32/sm_80": GOOD}, {"op/kernel/x/float32": "a reason"}) == [
        "op/kernel/x/float32 does not spill: take it out of ALLOWED_STACK"]


def test_each_kind_of_product_is_counted():
    text = """
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
        wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 0;
        @%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p2;
        @%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], [ %r3 + 0 ], %rd2, %r2, %p2;
        tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1];
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [ %rd1 + 0 ];"""
    assert compile_kernels.read_ptx(text) == {"mma": 1, "wgmma": 1, "tcgen05": 2, "loads": "1x128", "stores": ""}


def test_problems_are_found():
    good = GOOD
    assert audit.find_problems({"op/kernel/x/float32/sm_80": good}) == []
    (spill,) = audit.find_problems({"op/kernel/x/float32/sm_80": {**good, "stack_bytes": 8, "spills_in_loops": 2}})
    assert "spills: 8 bytes" in spill
    (shared,) = audit.find_problems({"op/kernel/x/float32/sm_80": {**good, "shared_bytes": 170_000}})
    assert "170000 bytes of shared memory" in shared
    assert audit.find_problems({"op/kernel/x/float32/sm_90": {**good, "shared_bytes": 170_000}}) == []


def test_a_spill_in_a_loop_passes_with_a_reason_only(monkeypatch):
    key, good = "op/kernel/x/float32", GOOD
    spill = lambda stack, inside: audit.find_problems(
        {f"{key}/sm_80": {**good, "stack_bytes": stack, "spills_in_loops": inside}})
    assert spill(8, 0) == [] and len(spill(8, 1)) == len(spill(audit.LARGEST_STACK_BYTES + 1, 0)) == 1
    monkeypatch.setitem(audit.ALLOWED_STACK, key, "for this test")
    assert spill(8, 1) == spill(1000, 1) == []
    monkeypatch.delitem(audit.ALLOWED_STACK, key)
    monkeypatch.setitem(audit.ALLOWED_STACK, f"{key}/sm_90", "for another architecture")
    assert len(spill(8, 1)) == 1


LISTING = """
        /*0000*/  STL [R1], R2 ;
        /*0010*/  LDG.E.128 R4, [R6] ;
        /*0020*/  LDL R2, [R1+0x4] ;
        /*0030*/  @!P1 HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0040*/  @P3 BRA 0x70 ;
        /*0050*/  FMUL R9, R9, R9 ;
        /*0060*/  FFMA R9, R9, R9, R9 ;
        /*0070*/  FADD.FTZ R3, R3, R4 ;
        /*0080*/  @P0 BRA 0x20 ;
        /*0090*/  LDL R3, [R1] ;
        /*00a0*/  @P2 BRA 0x10 ;
        /*00b0*/  MUFU.EX2 R1, R2 ;
        /*00c0*/  EXIT ;"""


def test_spills_in_loops_are_counted():
    (code,) = sass.parse(LISTING).values()
    assert sass.spills_in_loops(code) == 1  # the stack access in the inner loop counts, those around it do not


def test_instructions_of_the_hot_loop_are_counted():
    """The hot loop of LISTING is its inner loop without the code that a branch jumps over: LDL, HMMA, BRA, FADD and BRA, that
    is 5 instructions, of which 1 is a tensor-core instruction and 1 an FADD.
    """
    (code,) = sass.parse(LISTING).values()
    assert str(sass.hot_loop(code)) == "loop 5 1 0 1 0"
    (code,) = sass.parse(LISTING.replace("HMMA", "MOV")).values()  # arithmetic without tensor cores: all of the loop
    assert str(sass.hot_loop(code)) == "loop 7 0 1 2 0"
    (code,) = sass.parse(LISTING.replace("BRA", "NOP")).values()
    assert str(sass.hot_loop(code)) == "all 13 1 1 2 1"


def test_differences_are_found():
    compilers = {"triton": "1", "nvcc": "2"}
    facts = {"registers": 40, "stack_bytes": 0}
    committed = {"compilers": compilers, "rows": {"op/a/sm_80": facts, "cuda/f/b/sm_80": facts}}
    same = {"op/a/sm_80": facts, "cuda/f/b/sm_80": facts}
    assert audit.compare(same, compilers, committed, cuda=True) == ([], [])
    heavier = {**same, "op/a/sm_80": {**facts, "registers": 41}}
    assert audit.compare(heavier, compilers, committed, cuda=True)[0] == ["op/a/sm_80: registers was 40, is 41"]
    changes, notes = audit.compare(heavier, {**compilers, "triton": "9"}, committed, cuda=True)
    assert changes == [] and "triton 1, here is 9" in notes[0]
    changes, _ = audit.compare({"op/new/sm_80": facts}, compilers, committed, cuda=True)
    assert len(changes) == 3 and "op/new/sm_80 is not in the committed table" in changes[-1]
    assert audit.compare({"op/a/sm_80": facts}, compilers, committed, cuda=False)[0] == []


def test_write_then_read(tmp_path):
    path = tmp_path / "table.json"
    rows = {"b/sm_80": {"registers": 1, "spills_in_loops": 0}, "b/sm_90": {"registers": 3}, "a/sm_80": {"registers": 2}}
    audit.write(path, {"triton": "1", "nvcc": None}, rows)
    assert audit.read(path) == {"compilers": {"triton": "1", "nvcc": None}, "rows": rows}
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


def test_command_compiles_from_an_interpreted_process():
    """`python -m tools.audit` compiles also where TRITON_INTERPRET=1 is set, under which Triton would interpret the kernels."""
    out = subprocess.run([sys.executable, "-m", "tools.audit", "--op", "rope_table", "--jobs", "1"], capture_output=True,
                         text=True, cwd=PACKAGE.parent, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert out.returncode == 0, out.stderr
    assert "static: compiled, not run" in out.stdout and "6 kernels compiled, none run: no problem" in out.stdout


def test_specialization_is_triton_s_own():
    """The audit derives the same types, constants and divisibility from a launch's arguments as Triton's own launcher does."""
    code = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from internlm2_kernels import OPS
from tools import audited, compile_kernels as audit
from internlm2_kernels._triton import common
backend, count = make_backend(GPUTarget("cuda", 90, 32)), 0
def compare(kernel, arguments, options):
    global count
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    real = {n: torch.empty_strided((1,), (1,), dtype=v.dtype, device="meta") if isinstance(v, torch.Tensor) else v
            for n, v in arguments.items()}
    _, found, _ = binder(**real, **options)
    signature, constants, attributes = audit.specialize(kernel, arguments)
    assert [kind for kind, _ in found] == list(signature.values()), (kernel, found, signature)
    aligned = {(i,) for i, (kind, value) in enumerate(found) if kind != "constexpr" and isinstance(value, str) and "D" in value}
    assert aligned == set(attributes), (kernel, found, attributes)
    count += 1
common.record = compare
for op in OPS:
    if "triton" in OPS[op].backends:
        for _, call in getattr(audited, op)(torch.bfloat16, lambda *s, dtype: torch.empty(s, dtype=dtype, device="meta")):
            call()
print(count)
"""
    out = run("-c", code)
    assert out.returncode == 0, out.stderr[-3000:]
    assert int(out.stdout) > 30


def test_changed_sources_are_compiled_again():
    """A row stays valid while compiler and source are unchanged; its kernel is then not compiled again."""
    compilers = {"triton": "1", "nvcc": "2"}
    row = next(iter(audit.read(audit.TABLE)["rows"].values()))  # with every field that the audit knows now
    older = {name: value for name, value in row.items() if name != "tcgen05"}  # written by an audit with fewer fields
    committed = {"compilers": compilers, "rows": {"op/a/sm_80": row, "cuda/f/b/sm_80": row, "op/old/sm_80": older}}
    assert set(audit.unchanged(committed, compilers)) == {"op/a/sm_80", "cuda/f/b/sm_80"}
    assert set(audit.unchanged(committed, {"triton": "1", "nvcc": None})) == {"op/a/sm_80"}
    code = """
import json
from tools import audit
rows = audit.read(audit.TABLE)["rows"]
kept, compiled = audit._compile_all(["rope_table"], [], 1, rows)
assert (len(kept), compiled) == (6, 0), compiled
key = next(iter(kept))
kept, compiled = audit._compile_all(["rope_table"], [], 1, rows | {key: rows[key] | {"source": "another"}})
assert (len(kept), compiled) == (6, 1) and kept[key] == rows[key], compiled
"""
    out = run("-c", code)
    assert out.returncode == 0, out.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_check():
    out = run("-m", "tools.audit", "--check", "--all")
    assert out.returncode == 0, out.stdout + out.stderr


PEERS = """
import torch
from internlm2_kernels._triton.losses import scale_kernel
from tools import peers
x, one = torch.empty(4096, dtype=torch.bfloat16, device="meta"), torch.empty((), device="meta")
launch = lambda: scale_kernel[(1,)](x, one, x, 4096, BLOCK=1024, num_warps=4)
(kernel,) = peers.recorded(launch, peers.wide_accesses("LDG"))
assert list(kernel.signature.values()) == ["*bf16", "*fp32", "*bf16", "i32", "constexpr"], kernel.signature
assert kernel.options == {"num_warps": 4, "num_stages": 3}
found = peers.count([kernel, kernel], "90")
assert found["fmul_fadd"] == 2 and found["mufu"] == found["tensor"] == 0, found  # a product for each element, twice
"""


def test_launches_of_other_libraries_are_recorded_and_counted():
    out = run("-c", PEERS)
    assert out.returncode == 0, out.stderr[-3000:]
