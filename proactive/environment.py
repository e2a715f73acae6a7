"""Checks the environment variables by which torchrun, SLURM or Lightning tell a process its rank."""

import os

from datamodules.errors import UserError

NUMBERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NNODES", "JSM_NAMESPACE_RANK"),
)
RANKS = (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
INTERACTIVE = ("bash", "interactive")  # SLURM jobs whose tasks Lightning ignores


def refuse_impossible_rank() -> None:
    """Check the variables that Lightning reads without a check, partly at import.

    Raises:
        UserError: A variable is not a number, or they do not fit together, for example because another job left some.
    """
    found = {name: os.environ[name] for name in NUMBERS if name in os.environ}
    for name, value in found.items():
        if not (value.isascii() and value.isdecimal() and len(value) < 10):
            raise UserError(f"the environment variable {name} is not a number: {value!a}", f"unset {name}")
    for rank, size in RANKS:
        if int(found.get(rank, 0)) >= max(int(found.get(size, 1)), 1):
            count = found.get(size, "unknown")
            raise UserError(
                f"the environment variable {rank} is {found[rank]}, but {size} is {count}",
                f"Start with a launcher that sets both. If another job left them: unset {rank} {size}",
            )
    if "SLURM_NTASKS" in found and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE:
        for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
            if name not in found:
                raise UserError(
                    f"the environment variable SLURM_NTASKS is set, but {name} is not",
                    "Start with srun. If another job left it: unset SLURM_NTASKS",
                )
