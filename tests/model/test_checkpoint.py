"""Checkpoints: layouts, shards, errors that name damage of every kind, and saves that never lose the previous checkpoint."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from internlm2.checkpoint import load_model, load_tensors, save_model, save_tensors
from internlm2.config import PRESETS
from internlm2.layouts import merge_qkv, rotary_halves_from_pairs, split_qkv
from internlm2.model import InternLM2
from internlm2.reward import RewardModel
from internlm2.storage import CheckpointError, atomic_directory, atomic_file, present, verify_manifest

TINY = PRESETS["tiny"]
posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and POSIX limits")


@pytest.fixture(scope="module")
def model():
    return InternLM2(TINY, seed=1)


def assert_equal(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("layout", ["internlm2", "llama"])
@pytest.mark.parametrize("max_shard_bytes", [1, 200_000, 10**9])
def test_round_trip(model, tmp_path, layout, max_shard_bytes):
    save_model(model, tmp_path / "a", layout=layout, max_shard_bytes=max_shard_bytes)
    loaded = load_model(tmp_path / "a")
    assert_equal(loaded, model)
    assert loaded.config == TINY
    files = sorted(p.name for p in (tmp_path / "a").glob("*.safetensors"))
    tensors = len(model.state_dict())
    assert len(files) == {1: tensors, 200_000: len(files), 10**9: 1}[max_shard_bytes]
    if max_shard_bytes == 200_000:
        assert 1 < len(files) < tensors
        # Only the file of the embedding, a single tensor, exceeds the limit.
        sizes = [sum(t.nbytes for t in load_file(tmp_path / "a" / f).values()) for f in files]
        assert all(size <= 200_000 or size == TINY.vocab_size * TINY.hidden_size * 4 for size in sizes)
    index = tmp_path / "a" / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if index.exists():
        assert json.loads(index.read_text())["metadata"]["total_size"] == TINY.num_parameters * 4


def test_llama_layout_has_llamas_tensors(model, tmp_path):
    save_model(model, tmp_path / "a", layout="llama")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    wqkv = model.state_dict()["model.layers.1.attention.wqkv.weight"].view(2, 4, 32, 128)
    assert torch.equal(tensors["model.layers.1.self_attn.q_proj.weight"].view(2, 2, 32, 128), wqkv[:, :2])
    assert torch.equal(tensors["model.layers.1.self_attn.k_proj.weight"].view(2, 32, 128), wqkv[:, 2])
    assert torch.equal(tensors["model.layers.1.self_attn.v_proj.weight"].view(2, 32, 128), wqkv[:, 3])
    for ours, theirs in {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.items():
        weight = model.state_dict()[f"model.layers.0.feed_forward.{ours}.weight"]
        assert torch.equal(tensors[f"model.layers.0.mlp.{theirs}.weight"], weight)


@pytest.fixture(scope="module")
def reward_model():
    return RewardModel(dataclasses.replace(TINY, reward_token_id=9), seed=2)


@pytest.mark.parametrize("layout", ["internlm2", "llama"])
@pytest.mark.parametrize("max_shard_bytes", [100_000, 10**9])
def test_reward_models_round_trip(reward_model, tmp_path, layout, max_shard_bytes):
    save_model(reward_model, tmp_path / "a", layout=layout, max_shard_bytes=max_shard_bytes, dtype=torch.float32)
    loaded = load_model(tmp_path / "a", compute_dtype=torch.bfloat16)
    assert type(loaded) is RewardModel and loaded.compute_dtype == torch.bfloat16
    assert_equal(loaded, reward_model)
    assert loaded.config == reward_model.config and loaded.config.reward_token_id == 9


def test_a_reward_folder_is_as_the_released_ones(reward_model, tmp_path):
    save_model(reward_model, tmp_path / "a", dtype=torch.float16)
    hf = json.loads((tmp_path / "a" / "config.json").read_text())
    assert hf["architectures"] == ["InternLM2ForRewardModel"] and hf["reward_token_id"] == 9
    assert hf["torch_dtype"] == "float16"
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert tensors["v_head.weight"].shape == (1, 128) and "output.weight" not in tensors
    # The same weights under the name of a language model are refused: the output matrix is missing.
    hf["architectures"] = ["InternLM2ForCausalLM"]
    (tmp_path / "a" / "manifest.json").unlink()
    (tmp_path / "a" / "config.json").write_text(json.dumps(hf))
    with pytest.raises(CheckpointError, match=r"the tensor output.weight \[512, 128\] is in none of its files"):
        load_model(tmp_path / "a")


def test_a_critic_without_a_reward_token_is_saved_too(tmp_path):
    critic = RewardModel(TINY, seed=3)
    save_model(critic, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["reward_token_id"] is None
    loaded = load_model(tmp_path / "a")
    assert_equal(loaded, critic)
    assert loaded.config == TINY


def test_a_scaling_that_the_layout_cannot_hold_leaves_the_folder_as_it_was(model, tmp_path):
    save_model(model, tmp_path / "a")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    scaled = InternLM2(dataclasses.replace(TINY, rope_scaling=yarn))
    with pytest.raises(ValueError, match="the 'internlm2' layout cannot hold rope_scaling of type 'yarn'"):
        save_model(scaled, tmp_path / "a")
    assert_equal(load_model(tmp_path / "a"), model)
    save_model(scaled, tmp_path / "a", layout="llama")
    assert load_model(tmp_path / "a").config == scaled.config


def test_dtypes(model, tmp_path):
    save_model(model, tmp_path / "a", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = load_model(tmp_path / "a", dtype=torch.bfloat16)
    assert all(torch.equal(p, model.state_dict()[name].bfloat16()) for name, p in loaded.state_dict().items())
    wide = load_model(tmp_path / "a", compute_dtype=torch.bfloat16)
    assert wide.output.weight.dtype == torch.float32 and wide.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("heads", [4, 12])
def test_qkv_conversions_are_inverse(heads, generator):
    config = PRESETS["tiny"].preset("tiny", num_heads=heads)
    wqkv = torch.randn(config.qkv_size, 8, generator=generator)
    assert torch.equal(merge_qkv(*split_qkv(wqkv, config), config), wqkv)


def test_rotary_pairs_become_halves(tmp_path, generator):
    """Weights made for rotary pairs of neighbouring dimensions are permuted for pairs (i, i + d / 2), as our kernels rotate.
    The scores q k^T of both must be equal."""
    from internlm2_kernels import apply_rope, rope_table

    config = TINY
    wqkv = torch.randn(config.qkv_size, 8, dtype=torch.float64, generator=generator)
    x = torch.randn(5, 8, dtype=torch.float64, generator=generator)
    cos, sin = rope_table(5, config.head_dim)

    def scores_and_values(weight, interleaved):
        q, k, v = (x @ w.T for w in split_qkv(weight, config))
        q, k = q.view(5, 4, 32), k.view(5, 2, 32)
        q, k = apply_rope(q, k, cos, sin, interleaved=interleaved)
        return torch.einsum("shd,tgd->hgst", q, k), v

    permuted = rotary_halves_from_pairs(wqkv, config)
    (gold, gold_v), (ours, ours_v) = scores_and_values(wqkv, True), scores_and_values(permuted, False)
    torch.testing.assert_close(ours, gold)
    assert torch.equal(ours_v, gold_v)
    assert (scores_and_values(wqkv, False)[0] - gold).abs().max() > 0.1


def test_adapt_hf_applies_the_permutation(model, tmp_path):
    save_model(model, tmp_path / "a")
    loaded = load_model(tmp_path / "a", adapt_hf=False).state_dict()
    for name, tensor in model.state_dict().items():
        expected = rotary_halves_from_pairs(tensor, TINY) if "wqkv" in name else tensor
        assert torch.equal(loaded[name], expected)


def rewritten(path, change):
    """Changes the tensors of a saved folder, and removes its manifest, which other programs do not write."""
    (path / "manifest.json").unlink()
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_old_rotary_buffers_are_skipped(model, tmp_path):
    save_model(model, tmp_path / "a")
    rewritten(tmp_path / "a", lambda t: t.update({"model.layers.0.attention.rotary_emb.inv_freq": torch.ones(8)}))
    assert_equal(load_model(tmp_path / "a"), model)


W1 = "model.layers.1.feed_forward.w1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(W1), rf"the tensor {W1} \[256, 128\] is in none of its files"),
        (lambda t: t.update(extra=torch.ones(1)), r"model.safetensors: unexpected tensor extra"),
        (lambda t: t.update({W1: torch.ones(128, 256)}), rf"model.safetensors: {W1} must be \[256, 128\], got \[128, 256\]"),
        (lambda t: t.update({W1: t[W1].to(torch.int8)}), rf"model.safetensors: {W1} must be of a floating-point type, got I8"),
    ],
)
def test_wrong_tensors_are_named(model, tmp_path, change, message):
    save_model(model, tmp_path / "a")
    rewritten(tmp_path / "a", change)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "a")


def test_llama_biases_and_missing_parts_are_named(model, tmp_path):
    save_model(model, tmp_path / "a", layout="llama")
    rewritten(tmp_path / "a", lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    with pytest.raises(CheckpointError, match="unexpected tensor model.layers.0.self_attn.q_proj.bias"):
        load_model(tmp_path / "a")
    save_model(model, tmp_path / "b", layout="llama")
    rewritten(tmp_path / "b", lambda t: t.pop("model.layers.0.self_attn.k_proj.weight"))
    with pytest.raises(CheckpointError, match=r"the tensor model.layers.0.self_attn.k_proj.weight \[64, 128\] is in none"):
        load_model(tmp_path / "b")


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_every_flipped_bit_is_noticed(model, tmp_path):
    save_model(model, tmp_path / "a", max_shard_bytes=100_000)
    generator = random.Random(0)
    for file in sorted((tmp_path / "a").iterdir()):
        size = file.stat().st_size
        for at in [0, size - 1, *generator.sample(range(size), 8)]:
            flip(file, at)
            # The error names the file in which the bit was flipped, also where that is the manifest itself.
            with pytest.raises(CheckpointError, match=file.name):
                load_model(tmp_path / "a")
            flip(file, at)
    assert_equal(load_model(tmp_path / "a"), model)


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "no manifest"])
def test_truncated_files_are_named(model, tmp_path, manifest):
    save_model(model, tmp_path / "a")
    if not manifest:
        (tmp_path / "a" / "manifest.json").unlink()
    for name in ("model.safetensors", "config.json"):
        file = tmp_path / "a" / name
        content = file.read_bytes()
        for keep in (0, 5, len(content) // 2, len(content) - 3):
            file.write_bytes(content[:keep])
            said = f"{name} is truncated: expected {len(content)} bytes, got {keep}" if manifest else f"{name} is damaged"
            with pytest.raises(CheckpointError, match=said):
                load_model(tmp_path / "a")
        file.write_bytes(content)
    assert_equal(load_model(tmp_path / "a"), model)


def test_missing_files_are_named(model, tmp_path):
    with pytest.raises(CheckpointError, match="config.json is missing"):
        load_model(tmp_path / "nothing")
    save_model(model, tmp_path / "a", max_shard_bytes=100_000)
    shard = next((tmp_path / "a").glob("model-00002*"))
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        load_model(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        load_model(tmp_path / "a")
    shard.write_bytes(content)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    index["weight_map"]["output.weight"] = shard.name
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"says that {shard.name} holds output.weight, but it does not"):
        load_model(tmp_path / "a")
    index["weight_map"]["output.weight"] = "../a/" + shard.name
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which lies outside the folder"):
        load_model(tmp_path / "a")
    for file in (tmp_path / "a").glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="only safetensors are read"):
        load_model(tmp_path / "a")


def test_tensors(tmp_path):
    tensors = {"a": torch.arange(6).view(2, 3).t(), "b": torch.ones((), dtype=torch.bfloat16)}
    save_tensors(tensors, tmp_path / "t.safetensors")
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) for k in tensors)
    with pytest.raises(CheckpointError, match="u.safetensors is missing"):
        load_tensors(tmp_path / "u.safetensors")
    (tmp_path / "t.safetensors").write_bytes((tmp_path / "t.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="t.safetensors is damaged or truncated"):
        load_tensors(tmp_path / "t.safetensors")


# --- All or nothing -----------------------------------------------------------------------------------------------------


def test_an_error_leaves_the_previous_file_and_folder(tmp_path):
    for version in ("old", "new"):
        try:
            with atomic_file(tmp_path / "file") as temporary:
                temporary.write_text(version)
                assert version == "old"
            with atomic_directory(tmp_path / "folder") as temporary:
                (temporary / "x").write_text(version)
        except AssertionError:
            pass
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "folder") as temporary:
        (temporary / "x").write_text("new")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "x").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_is_replaced_whole(tmp_path):
    for names in (["a", "b"], ["c"]):
        with atomic_directory(tmp_path / "folder") as temporary:
            for name in names:
                (temporary / name).write_text(name)
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["c", "manifest.json"]
    verify_manifest(tmp_path / "folder")


def write_version(path, version):
    with atomic_directory(path) as temporary:
        for part in range(4):
            (temporary / str(part)).write_text(str(version) * 5000)


def read_version(path):
    """The version of a saved folder, after a check that all its files are of that version."""
    folder = present(path)
    verify_manifest(folder)
    texts = {(folder / str(part)).read_text() for part in range(4)}
    assert len(texts) == 1
    return int(texts.pop()[0])


@posix
@pytest.mark.parametrize("step", ["rename", "rmtree"])
@pytest.mark.parametrize("call", [1, 2])
def test_killed_at_the_last_moment(tmp_path, monkeypatch, step, call):
    """A save that replaces a folder is killed just before a rename or removal: the old or the new folder is complete."""
    import shutil

    module = os if step == "rename" else shutil
    path = tmp_path / "folder"
    write_version(path, 1)
    if (child := os.fork()) == 0:
        original, calls = getattr(module, step), []

        def killing(*args, **options):
            calls.append(args)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(module, step, killing)
        write_version(path, 2)
        os._exit(0)
    os.waitpid(child, 0)
    assert read_version(path) == (2 if step == "rmtree" else 1)
    write_version(path, 3)
    assert read_version(path) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@posix
def test_killed_at_random(tmp_path):
    path = tmp_path / "folder"
    write_version(path, 0)
    pauses = random.Random(0)
    inside = 0
    for _ in range(40):
        if (child := os.fork()) == 0:
            for version in range(1, 10**6):
                write_version(path, version % 10)
            os._exit(0)
        time.sleep(pauses.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        inside += (tmp_path / ".folder.writing").exists()
        assert read_version(path) in range(10)
    assert inside >= 5  # otherwise too few of the kills hit a save to show anything
    write_version(path, 7)
    assert read_version(path) == 7 and [p.name for p in tmp_path.iterdir()] == ["folder"]


FULL_DISK = """
import resource, sys
from internlm2.checkpoint import load_model, save_model
from internlm2.config import ModelConfig
from internlm2.model import InternLM2
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    save_model(InternLM2(ModelConfig.preset("tiny"), seed=2), sys.argv[1])
except OSError as error:
    print("refused:", error)
    load_model(sys.argv[1])
"""


@posix
def test_a_full_disk_leaves_the_previous_checkpoint(model, tmp_path):
    """A limit on file sizes stands for a full disk: it also makes a write fail part of the way through."""
    path = tmp_path / "a"
    save_model(model, path)
    result = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("refused:") and "model.safetensors could not be written" in result.stdout
    assert_equal(load_model(path), model)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
