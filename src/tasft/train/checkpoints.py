"""Checkpoints of a training: which there are, and which can be gone on from."""

import json
import shutil
import zipfile
from pathlib import Path

from tasft.core import provenance, ranks
from tasft.core.errors import UserError
from tasft.models.load import check_tensors

# In a checkpoint that was written because training was stopped there, at no multiple of save_steps.
STOPPED = "stopped"


def checkpoints(folder: Path, save_steps: int) -> list[str]:
    """Names of the checkpoints of a finished training, in its order, without one that equals its result.

    Raises:
        UserError: Earlier ones were not kept, or they hold parts of a model.
    """
    paths = sorted((path for path in _whole(folder) if not (path / STOPPED).exists()), key=_step)
    if len(paths) == 1 and _step(paths[0]) > save_steps:
        raise UserError(
            f"evaluate.checkpoints: {folder} was trained without it and kept its last checkpoint alone: remove that "
            "folder to have it trained again"
        )
    result = {provenance.file_hash(path) for path in _weights(folder / "adapter") + _weights(folder / "model")}
    kept = []
    for path in paths:
        weights = _weights(path)
        if not weights:
            raise UserError(f"evaluate.checkpoints: {path} holds parts of a model: train with --launch ddp or none")
        if {provenance.file_hash(file) for file in weights} != result:
            kept.append(path.name)
    return kept


def _weights(folder: Path) -> list[Path]:
    return sorted([*folder.glob("adapter_model*.safetensors"), *folder.glob("model*.safetensors")])


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _whole(folder: Path) -> list[Path]:
    # trainer_state.json is written last: a folder without it is half a checkpoint.
    return [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that can be gone on from; those that are damaged are removed, and it is said.

    Raises:
        UserError: It was written under another kind of sharding.
    """
    newest: Path | None = None
    for path in sorted(_whole(folder), key=_step, reverse=True):
        damage = _damage(path)
        if damage is None:
            newest = path
            break
        ranks.wait()  # All have looked at it.
        if ranks.is_first():
            print(f"note: {damage}: training goes on from a step before {path.name}", flush=True)
            shutil.rmtree(path)
    if newest is None:
        return None
    kinds = {"fsdp": "pytorch_model_fsdp*", "deepspeed": "global_step*"}
    wrote = next((kind for kind, files in kinds.items() if any(newest.glob(files))), None)
    if wrote != ranks.sharding():
        raise UserError(
            f"{newest} was written {f'under {wrote}' if wrote else 'by whole models'}: give the --launch that it was "
            "begun with, or remove it to begin anew"
        )
    return str(newest)


def _damage(checkpoint: Path) -> str | None:
    """Which file of a checkpoint is damaged, after a power cut or by a bad disk; None if none is."""
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                check_tensors(path)
            elif path.suffix in (".pt", ".pth", ".bin") and path.is_file():
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        raise zipfile.BadZipFile
        except (ValueError, zipfile.BadZipFile, UserError):
            return f"{path}: damaged or cut short"
    return None
