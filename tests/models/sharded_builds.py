"""Networks that are built spread over ranks, to be built on each of them by `tests.ranks.on_ranks`."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from datamodules.errors import UserError
from datamodules.prompting.tokenizers import train_tokenizer
from models.networks.building import build_network
from models.networks.distributed_loading import build_sharded_network
from models.networks.network_options import Head, NetworkOptions
from models.networks.sharding import gather

TEXT = ["At 9:14 the user opens a file and reads the report about the printer."] * 20


def built(cases: list[tuple[Head, str]]) -> list[Any]:
    """Of each case (head, folder): the weights and buffers on one device and spread, or the error."""
    mesh = _mesh()
    results: list[Any] = []
    for head, folder in cases:
        tokenizer = train_tokenizer(TEXT, 280)
        options: dict[str, Any] = {"mesh": mesh, "device": torch.device("cpu"), "precision": "32-true"}
        try:
            torch.manual_seed(1)
            network = build_sharded_network(NetworkOptions(head, folder), tokenizer, **options)
            torch.manual_seed(1)
            expected = build_network(NetworkOptions(head, folder), tokenizer)
        except UserError as error:
            results.append([error.what, error.hint])
            continue
        found = gather(network)
        assert found is not None
        buffers = [dict(model.named_buffers()) for model in (network, expected)]
        weights = {name: weight.detach() for name, weight in expected.state_dict().items()}
        results.append({"found": found | buffers[0], "expected": weights | buffers[1]})
    return results


def peak_memory(folder: str) -> dict[str, float]:
    """The most memory that any rank had, and how many weights are not those of the file."""
    config = json.loads(Path(folder, "config.json").read_text())
    network = build_sharded_network(
        NetworkOptions("language model", folder),
        train_tokenizer(TEXT, config["vocab_size"]),
        mesh=_mesh(),
        device=torch.device("cpu"),
        precision="32-true",
    )
    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0, dtype=torch.float64)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    wrong = torch.zeros((), dtype=torch.int64)
    for number, weight in enumerate(network.parameters()):
        wrong += (weight.to_local() != number).sum()
    dist.all_reduce(wrong)
    return {"peak": float(peak), "wrong": float(wrong)}


def _mesh() -> Any:
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    return init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("shards",))
