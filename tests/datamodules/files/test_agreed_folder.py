"""Ranks that torchrun or SLURM has started write to one run folder."""

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from datamodules.files.run_folders import agreed_folder, new_run_folder
from tests.ranks import on_ranks


def agree(root: Path, environment: dict[str, str], rank_name: str) -> list[str]:
    """Which folder each rank comes to."""
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    os.environ |= {**environment, rank_name: str(rank), "SLURM_NTASKS": str(ranks)}
    folder = agreed_folder(root / "name", lambda: new_run_folder(root, "name"))
    store.set(f"found/{rank}", str(folder))
    found = [store.get(f"found/{other}").decode() for other in range(ranks)]
    store.set(f"done/{rank}", "")
    if rank == 0:  # which keeps the store
        store.wait([f"done/{other}" for other in range(ranks)])
    return found


@pytest.mark.parametrize(
    ("environment", "rank_name"),
    [
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}, "RANK"),
        ({"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0"}, "SLURM_PROCID"),
    ],
    ids=["torchrun", "SLURM"],
)
def test_all_ranks_use_the_folder_that_rank_0_makes(
    environment: dict[str, str], rank_name: str, tmp_path: Path
) -> None:
    (tmp_path / "name" / "3").mkdir(parents=True)
    found = on_ranks(3, agree, tmp_path, environment, rank_name, folder=tmp_path / "results")
    assert found == [str(tmp_path / "name" / "4")] * 3
    assert not (tmp_path / "name" / "5").exists()
