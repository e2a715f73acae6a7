"""Why a rank ended, in words; the jobs that end are in tests/proactive/test_sharded_fit.py."""

import pytest
import torch.distributed as dist

from callbacks.watch_ranks import lost_a_rank, reason


@pytest.mark.parametrize(
    ("code", "words"),
    [(-9, "was killed by SIGKILL"), (-11, "was killed by SIGSEGV"), (2, "ended with exit code 2")],
)
def test_an_exit_code_is_explained(code: int, words: str) -> None:
    assert reason(code).startswith(words)
    assert ("memory" in reason(code)) == (code == -9)


def test_a_lost_connection_is_distinguished_from_other_errors() -> None:
    assert lost_a_rank(dist.DistBackendError("NCCL error: remote process exited"))
    assert lost_a_rank(RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4711"))
    assert not lost_a_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost_a_rank(MemoryError())
