"""RunCheckpoints: the rotating checkpoints of a run, of which one is always sound.

A checkpoint is a folder step-00000123 of safetensors files, run.json and a manifest of sizes and sha256 digests. It is
written beside its final name, forced onto the disk, and renamed: a kill or a full disk at any moment leaves the whole
checkpoint or none of it, and older ones are removed only after it stands.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from internlm2.checkpoint import CONFIG, CheckpointError, atomic_directory, verify_manifest, write_manifest
from internlm2.config import ModelConfig

Tensors = dict[str, dict[str, torch.Tensor]]
RECORD = "run.json"


class RunCheckpoints:
    """The checkpoints of one run, in a folder of their own; the newest `keep` stay. One process at a time."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, sound or not, in order."""
        matches = (re.fullmatch(r"step-(\d{8,})", p.name) for p in self.folder.glob("step-*"))
        return sorted(int(m[1]) for m in matches if m)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, tensors: Tensors, record: dict, config: ModelConfig) -> Path:
        """Writes a checkpoint, then removes those beyond `keep`.

        tensors: file name -> tensors; record: what JSON can hold, written as run.json
        config:  of the model; written as config.json, so that the folder is a model that load_model reads
        Errors:  OSError names the file; the checkpoints before it are untouched then
        """
        path = self.path(step)
        with atomic_directory(path) as temporary:
            for name, values in tensors.items():
                try:
                    save_file({k: v.contiguous() for k, v in values.items()}, temporary / name, {"format": "pt"})
                except SafetensorError as error:
                    raise OSError(f"{path / name} could not be written: {error}") from error
            hf = config.to_hf() | {"torch_dtype": "float32"}
            (temporary / CONFIG).write_text(json.dumps(hf, indent=1) + "\n")
            (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            write_manifest(temporary)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return path

    def load_newest(self, warn: Callable[[str], None]) -> tuple[Tensors, dict] | None:
        """(tensors, record) of the newest sound checkpoint; None where there are none at all.

        A damaged one is told to `warn`, with the file and its fault, and set aside as step-N.damaged.
        Errors: CheckpointError where there are checkpoints, but no sound one: starting afresh is for the user to choose;
                OSError where one cannot be read at present (permissions, open files): nothing is set aside then
        """
        self._clean_up()
        faults = []
        for step in reversed(self.steps()):
            path = self.path(step)
            try:
                verify_manifest(path)
                tensors = {p.name: load_file(p) for p in sorted(path.glob("*.safetensors"))}
                return tensors, json.loads((path / RECORD).read_text())
            except (CheckpointError, SafetensorError) as error:  # an OSError says nothing of the bytes: it is raised
                faults.append(str(error))
                aside = path.with_name(path.name + ".damaged")
                warn(f"checkpoint {path.name} refused: {error}; set aside as {aside.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        if not faults and any(self.folder.glob("step-*.damaged")):
            faults = ["all of them were found damaged before"]
        if faults:
            raise CheckpointError(
                f"no sound checkpoint in {self.folder}: {'; '.join(faults)}. Remove the run's folder to start afresh."
            )
        return None

    def _clean_up(self) -> None:
        """Removes what a killed process left half done, and gives back a checkpoint that was about to be replaced."""
        for unfinished in self.folder.glob(".step-*.writing"):
            shutil.rmtree(unfinished)
        for previous in self.folder.glob(".step-*.previous"):
            path = previous.with_name(previous.name[1:].removesuffix(".previous"))
            shutil.rmtree(previous) if path.exists() else previous.rename(path)
