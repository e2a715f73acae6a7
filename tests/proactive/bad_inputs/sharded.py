"""Checkpoints of many ranks, damaged, edited, or made by somebody else."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from models.learning import sharded_files as shards
from models.learning.checkpoint_paths import VALUES
from tests.proactive.bad_inputs.case import Case, Place
from tests.proactive.bad_inputs.checkpoints import BAD, Edit, Payload, put, take

DATA = "RewardDataModule"
SHARD = f"{shards.WEIGHTS}/shard-00001-model-00001-of-00001.safetensors"


def sharded(
    edit: Edit = lambda values: None,
    before: Callable[[Path], object] = lambda folder: None,
    after: Callable[[Path], object] = lambda folder: None,
) -> Callable[[Place], None]:
    """Prepares the run's last checkpoint as one rank would have written it.

    Args:
        edit: What is done to its plain values.
        before: What is done to its files before their checksums are taken.
        after: What is done to them then.
    """

    def prepare(place: Place) -> None:
        folder = place.folder / BAD
        (folder / shards.WEIGHTS).mkdir(parents=True)
        values: dict[str, Any] = torch.load(place.run / "checkpoints" / "last.ckpt", weights_only=True)
        save_file(values["state_dict"], folder / SHARD)
        before(folder)
        sums = shards.checksums(folder, [folder / name for name in shards.files(folder)])
        values |= {"state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "aliases": {}, "files": sums}
        edit(values)
        torch.save(values, folder / VALUES)
        after(folder)

    return prepare


def cut(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])


def great(folder: Path) -> None:
    """Says in the header that a tensor is far greater than the file."""
    header = b'{"network.x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    (folder / SHARD).write_bytes(len(header).to_bytes(8, "little") + header)


def pickled_index(folder: Path) -> None:
    """The index that the usual format of distributed checkpoints has."""
    (folder / shards.WEIGHTS / ".metadata").write_bytes(pickle.dumps(Payload()))


WRONG: list[tuple[str, str, Callable[[Place], None]]] = [
    ("no list of files", "files", sharded(take("files"))),
    ("files as a list", "files", sharded(put("files", value=[SHARD]))),
    ("a file elsewhere", "files", sharded(put("files", value={"../other.safetensors": 1}))),
    ("a file at a path", "files", sharded(put("files", value={"/etc/passwd": 1}))),
    ("a checksum of text", "files", sharded(put("files", value={SHARD: "good"}))),
    ("a wrong checksum", SHARD, sharded(put("files", value={SHARD: 1}))),
    ("no names of weights with several", "aliases", sharded(take("aliases"))),
    ("names of weights as a list", "aliases", sharded(put("aliases", value=[1]))),
    ("a shard missing", SHARD, sharded(after=lambda folder: (folder / SHARD).unlink())),
    ("a shard cut short", SHARD, sharded(after=cut)),
    ("a shard cut short before its checksum", BAD, sharded(before=cut)),
    ("a shard that is greater than its file", BAD, sharded(before=great)),
    ("a shard of nothing", BAD, sharded(before=lambda folder: (folder / SHARD).write_bytes(b""))),
    (
        "a shard too many",
        "other",
        sharded(after=lambda folder: save_file({}, folder / "weights" / "other.safetensors")),
    ),
    ("no values", BAD, sharded(after=lambda folder: (folder / VALUES).unlink())),
    ("values cut", BAD, sharded(after=lambda folder: (folder / VALUES).write_bytes(b"PK"))),
    ("values of a list", BAD, sharded(after=lambda folder: torch.save([1], folder / VALUES))),
    ("no task", "task", sharded(take("task"))),
    ("temperature as text", "temperature", sharded(put("calibration", "temperature", value="hot"))),
    ("no training histories", "training_histories", sharded(take(DATA, "training_histories"))),
    ("optimizers of weights that are not there", "lr_schedulers", sharded(put("lr_schedulers", value=[{}]))),
    ("a payload among the values", BAD, sharded(put("options", value=Payload()))),
    ("a pickled index", ".metadata", sharded(after=pickled_index)),
    ("a pickled index with its checksum", "files", sharded(before=pickled_index)),
]
EVALUATE = ["reward", f"--checkpoint={BAD}", "--quiet"]
CASES = [
    *(Case(f"evaluate {name}", "evaluate", EVALUATE, named, prepare) for name, named, prepare in WRONG),
    *(Case(f"resume {name}", "fit", [f"--ckpt_path={BAD}"], named, prepare) for name, named, prepare in WRONG[::4]),
    Case("evaluate the checkpoint itself", "evaluate", EVALUATE, "", sharded(), accepted=True),
]
