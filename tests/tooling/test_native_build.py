"""Properties of the compiled library that no call shows: the symbols of its objects, its registrations and their signatures."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

import internlm2_kernels as ik
from internlm2_kernels import OPS
from internlm2_kernels._registry import _C

pytestmark = pytest.mark.skipif(_C is None, reason="needs the compiled library")
ROOT = Path(ik.__file__).parent.parent


@pytest.fixture(scope="module")
def objects():
    version = torch.__version__.split("+")[0]
    folder = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}-torch{version}"
    if not (folder / "cpu").is_dir() or not all(map(shutil.which, ("nm", "objdump"))):
        pytest.skip("needs the objects of a build in this source tree, nm and objdump")
    return folder


def lines(*command):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout.splitlines()


def test_instruction_set_objects_define_no_shared_symbol(objects):
    """Objects built for an instruction set define no symbol that another build defines too. Of such weak symbols the linker
    keeps one copy, so that AVX-512 code could run where AVX2 was chosen.
    """
    for isa, namespace in (("avx2", "AVX2"), ("avx512", "AVX512"), ("avx512_bf16", "AVX512_BF16"), ("amx", "AMX")):
        sources = (ROOT / "csrc" / "cpu").rglob("*.cpp")
        names = {path.name for path in sources if isa in ("avx2", "avx512") or isa in path.read_text().splitlines()[0].split()}
        assert len(names) >= 4  # a source says in its first line for which instruction sets it is built beyond these two
        found = list((objects / "cpu").rglob(f"*.{isa}.o"))
        assert {path.name.removesuffix(f".{isa}.o") for path in found} >= names
        for path in found:
            if path.name.removesuffix(f".{isa}.o") not in names:
                continue  # left over from a source that has been removed
            defined = [line.split() for line in lines("nm", "-C", "--defined-only", path)]
            assert defined
            for fields in defined:
                kind, symbol = (fields[1], " ".join(fields[2:])) if len(fields[0]) == 16 else (fields[0], " ".join(fields[1:]))
                assert kind not in "VvWwu", f"{path.name}: weak symbol {symbol}"
                assert kind not in "BbDd", f"{path.name}: writable static data {symbol}"
                assert kind in "tr" or f"internlm2::cpu::{namespace}::" in symbol, f"{path.name}: {kind} {symbol}"


TILES = {"ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"}


@pytest.fixture(scope="module")
def used(objects):
    """A function that returns which wide registers (ymm, zmm), mask registers (k) and tile instructions an object uses."""
    words = f"%[yz]mm|%k[1-7]|{'|'.join(sorted(TILES))}"

    def of(path):
        command = f"objdump -d --no-show-raw-insn '{path}' | LC_ALL=C grep -oE '{words}' | sort -u"
        found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.split()
        return {word.lstrip("%").rstrip("1234567") if word.startswith("%k") else word.lstrip("%") for word in found}

    return {path: of(path) for path in objects.rglob("*.o")}


def test_no_object_uses_more_than_its_instruction_set(objects, used):
    for pattern, forbidden in (("*.cpp.o", {"ymm", "zmm"}), ("cpu/**/*.avx2.o", {"zmm", "k"})):
        found = list(objects.glob(pattern))
        assert found
        for path in found:
            assert not used[path] & forbidden, path.name


def test_tiles_are_in_their_own_objects_alone(objects, used):
    """The AMX objects contain real tile instructions, not their emulation, and no other object contains any."""
    for path in (objects / "cpu").rglob("*.o"):
        assert used[path] & TILES == (TILES if path.name.endswith(".amx.o") else set()), path.name


def test_wide_objects_use_their_registers(objects, used):
    """The disassembly is read as expected: without this the two tests above could pass on an empty listing."""
    assert all("ymm" in used[path] for path in objects.glob("cpu/**/*.avx2.o"))
    assert all("zmm" in used[path] for path in objects.glob("cpu/**/*.avx512.o"))


def test_library_exports_its_entry_alone():
    exported = [line.split()[-1] for line in lines("nm", "-D", "--defined-only", _C.__file__)]
    assert exported == ["PyInit__C"]


SCHEMA_TYPES = {"Tensor": "Tensor", "Optional[Tensor]": "Tensor?", "List[Tensor]": "Tensor[]", "List[int]": "int[]",
                "float": "float", "int": "int", "bool": "bool"}


def of_schema(schema):
    """The types of a schema as `_C.signatures()` writes them."""
    parts = lambda values: ", ".join(SCHEMA_TYPES[str(value.type)] for value in values)
    returns = parts(schema.returns)
    return f"({parts(schema.arguments)}) -> {returns if len(schema.returns) == 1 else f'({returns})'}"


def test_signatures_are_the_schemas():
    """The types that the C++ bindings read must be those of the schemas, which torch's dispatcher does not compare: an int read
    as a double would give garbage, and a Tensor read as an optional one would crash.
    """
    signatures = _C.signatures()
    expected = {f"{op.name}_{name}.{backend}": of_schema(overloads[backend]._schema)
                for op in OPS.values() for name, overloads in op.overloads.items() for backend in overloads
                if backend == "cpp" or (backend == "cuda" and _C.build_info()["cuda"])}
    assert signatures == expected


def test_a_wrong_signature_would_be_seen():
    schema = torch.ops.internlm2.rms_norm_fwd.cpp._schema
    assert of_schema(schema) == "(Tensor, Tensor, float, bool) -> (Tensor, Tensor)"
    assert of_schema(torch.ops.internlm2.qkv_rope_cache_fwd.cpp._schema).count("Tensor?") == 3


def test_every_registration_has_its_schema():
    """A misspelt overload raises no error when it is registered: it is an implementation without a schema."""
    assert not [line for line in torch._C._dispatch_find_dangling_impls() if "internlm2::" in line]


def test_float64_is_refused_by_cuda_with_a_reason():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x = torch.randn(2, 8, dtype=torch.float64, device="cuda")
    with pytest.raises(RuntimeError, match="float64"):
        ik.rms_norm(x, x[0], backend="cuda")
