"""The place in a job that torchrun, SLURM or Lightning has put this process in, as environment variables tell it."""

import os

from datamodules.errors import UserError

NUMBERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NNODES", "JSM_NAMESPACE_RANK"),
)
PLACES = (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
INTERACTIVE = ("bash", "interactive")  # jobs of SLURM in which Lightning does not look at its tasks


def refuse_impossible_place() -> None:
    """Check the variables that Lightning reads as they are, some of them while it is imported.

    Raises:
        UserError: One is no number, or they tell no place in a job, as leftovers of another job do.
    """
    found = {name: os.environ[name] for name in NUMBERS if name in os.environ}
    for name, value in found.items():
        if not (value.isascii() and value.isdecimal() and len(value) < 10):
            raise UserError(f"the environment variable {name} is no number: {value!a}", f"unset {name}")
    for rank, size in PLACES:
        if int(found.get(rank, 0)) >= max(int(found.get(size, 1)), 1):
            count = found.get(size, "unknown")
            raise UserError(
                f"the environment variable {rank} is {found[rank]}, but {size} is {count}",
                f"Start with what sets both; leftovers of another job: unset {rank} {size}",
            )
    if "SLURM_NTASKS" in found and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE:
        for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
            if name not in found:
                raise UserError(
                    f"the environment variable SLURM_NTASKS is set, but {name} is not",
                    "Start with srun; leftovers of another job: unset SLURM_NTASKS",
                )
