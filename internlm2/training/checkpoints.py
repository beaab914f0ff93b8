"""RunCheckpoints: the newest checkpoints of a run, at least one of which is complete at any moment.

A checkpoint is a folder step-00000123 of safetensors files, run.json and a manifest of sizes and sha256 digests. It is
written under a temporary name, forced onto the disk, and renamed. A kill or a full disk at any moment therefore leaves the
whole checkpoint or none of it, and older ones are removed only after the new one is complete.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from internlm2.checkpoint import save_tensors, write_config
from internlm2.layouts import config_to_hf
from internlm2.model import Decoder
from internlm2.storage import CheckpointError, atomic_directory, verify_manifest

Tensors = dict[str, dict[str, torch.Tensor]]
RECORD = "run.json"


class RunCheckpoints:
    """The checkpoints of one run, in a folder of their own; the newest `keep` are kept. One process at a time."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, damaged or not, in order."""
        matches = (re.fullmatch(r"step-(\d{8,})", p.name) for p in self.folder.glob("step-*"))
        return sorted(int(m[1]) for m in matches if m)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, tensors: Tensors, record: dict, model: Decoder) -> Path:
        """Writes a checkpoint, then removes the oldest beyond `keep`.

        tensors: file name -> tensors; record: what JSON can hold, written as run.json
        model:   its configuration and kind are written as config.json, so that load_model reads the folder as that model
        Errors:  OSError names the file; the earlier checkpoints are untouched then
        """
        path = self.path(step)
        with atomic_directory(path) as temporary:
            for name, values in tensors.items():
                save_tensors(values, temporary / name)
            # exact=False, because a run may use what the released class refuses, such as another rope_scaling. Then only
            # load_model can read the folder.
            hf = config_to_hf(model.config, head=model.head_name, exact=False)
            write_config(hf, temporary, model.model.norm.weight.dtype)
            (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return path

    def load_newest(self, warn: Callable[[str], None]) -> tuple[Tensors, dict] | None:
        """(tensors, record) of the newest undamaged checkpoint; None where there are no checkpoints at all.

        A damaged checkpoint is renamed to step-N.damaged, and `warn` is called with the file and its fault.
        Errors: CheckpointError where all checkpoints are damaged, since only the user should decide to start again;
                OSError where a checkpoint cannot be read at present (permissions, open files); then nothing is renamed
        """
        self._clean_up()
        faults = []
        for step in reversed(self.steps()):
            path = self.path(step)
            try:
                verify_manifest(path)
                tensors = {p.name: load_file(p) for p in sorted(path.glob("*.safetensors"))}
                return tensors, json.loads((path / RECORD).read_text())
            except (CheckpointError, SafetensorError) as error:  # an OSError does not mean that the bytes are damaged
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
        """Removes the unfinished folders of a process that was killed, and restores a checkpoint that this process was about
        to replace."""
        for unfinished in self.folder.glob(".step-*.writing"):
            shutil.rmtree(unfinished)
        for previous in self.folder.glob(".step-*.previous"):
            path = previous.with_name(previous.name[1:].removesuffix(".previous"))
            shutil.rmtree(previous) if path.exists() else previous.rename(path)
