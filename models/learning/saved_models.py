"""Models from checkpoints and exports, and the export of a model.

An export is a folder that transformers loads. `proactive.json` contains what only this project reads: the options,
the calibration and the state of the data module.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from datamodules.backbones.packaged import backbone_source
from datamodules.backbones.quiet import quiet_transformers
from datamodules.corpus.json_records import read_json
from datamodules.errors import UserError
from models.learning.calibration import Calibration
from models.learning.checkpoint_contents import ExportContent, refuse_options
from models.learning.checkpoint_paths import EXPORT_STATE
from models.learning.training import BackboneModule
from models.networks.adapter_files import ADAPTER_FILE, load_adapter, merged_state, rounded, save_adapter
from models.networks.adapters import refuse_unfit_adapter
from models.networks.building import base_from_config, load_network
from models.networks.configurations import network_from_config, refuse_other_size
from models.networks.network_options import ExportDtype
from models.networks.weight_files import weights_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_STATE = 2**30  # bytes: it contains the tokenizer and a digest of each training history

Model = TypeVar("Model", bound=BackboneModule)


def model_from_checkpoint(kind: type[Model], checkpoint: dict[str, Any]) -> Model:
    """The model of a loaded checkpoint, with weights. The backbone's files are needed only for an adapter.

    Args:
        kind: The class of the model.
        checkpoint: As `models.learning.checkpoint_files.load_run` returns it.

    Raises:
        UserError: The options are not those of the class, or the weights are not those of the described network.
    """
    options = {name: value for name, value in checkpoint["hyper_parameters"].items() if not name.startswith("_")}
    refuse_options(kind, options, "hyper_parameters")
    model, config = kind(**options), json.loads(checkpoint["backbone_config"])
    sizes = [weight.numel() for weight in checkpoint["state_dict"].values() if isinstance(weight, Tensor)]
    refuse_other_size(kind.head, config, len(sizes), sum(sizes), adapter=model.adapter is not None)
    _build_for_weights(model, config)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
    return model


def model_from_export(kind: type[Model], folder: Path) -> tuple[Model, dict[str, Any]]:
    """The model of an export, and the state of its data module.

    Raises:
        UserError: The folder is not an export of this project, or of another task, or its weights are not those of the
            described network.
    """
    content = export_state(folder)
    if (task := content["task"]) != kind.task:
        raise UserError(f"{folder} contains a model of task {task}, not {kind.task}", "Give another export folder.")
    refuse_options(kind, content["model"], f"{folder / EXPORT_STATE}, field model")
    model = kind(**content["model"])
    model.calibration = Calibration.of(content["calibration"])
    if content.get("base"):
        config = content["backbone_config"]
        refuse_other_size(kind.head, config, *weights_in([folder / ADAPTER_FILE]), adapter=True)
        _build_for_weights(model, config)
        assert model.network is not None
        assert model.base is not None
        model.base.refuse_other(content["base"])
        load_adapter(model.network, folder)
    else:
        model.network = load_network(kind.head, str(folder), attn_implementation=model.hparams["attn_implementation"])
    return model, content["data"]


def _build_for_weights(model: BackboneModule, config: dict[str, Any]) -> None:
    """Build the network of a configuration, for weights to be loaded into. For an adapter, build it with its base."""
    if model.adapter is None:
        model.network = network_from_config(model.network_options, config)
        return
    refuse_unfit_adapter(model.adapter, model.hparams["quantization"])
    model.network = base_from_config(model.network_options, config)
    model.insert_adapter()


def export_weights(
    model: BackboneModule,
    folder: Path,
    state: dict[str, Any],
    weights: dict[str, Tensor] | None = None,
    dtype: ExportDtype | None = None,
) -> None:
    """Write weights, configuration and `proactive.json`.

    Args:
        model: The model to export.
        folder: Created if missing.
        state: The state of its data module.
        weights: All weights, if the network is sharded; see `models.networks.sharding.gather`.
        dtype: The dtype of the weights, to which they are rounded; that of the network if None.
    """
    assert model.network is not None, "configure_model builds the network"
    options = {name: value for name, value in model.hparams.items() if not name.startswith("_")}
    options["dtype"] = dtype or options["dtype"]
    content = {"task": model.task, "model": options, "calibration": model.saved_calibration, "data": state}
    if model.exports_adapter:
        assert model.base is not None
        backbone = backbone_source(model.base.backbone)
        if Path(backbone).is_dir():
            backbone = str(Path(backbone).resolve())
        save_adapter(model.network, model.head, backbone, folder, dtype)
        content |= {"base": asdict(model.base), "backbone_config": model.network.config.to_dict()}
    else:
        network = model.network
        if model.adapter is not None:
            weights = merged_state(network, model.hparams["quantization"])
            content["model"] = options | {"adapter": None, "quantization": "none"}
        if dtype is not None:
            weights = rounded(weights or network.state_dict(), dtype)
        if model.adapter is not None or dtype is not None:
            network, weights = _plain_network(model, weights or {}), None
        with quiet_transformers():
            network.save_pretrained(folder, state_dict=weights)
    (folder / EXPORT_STATE).write_text(json.dumps(content, indent=1))


def _plain_network(model: BackboneModule, state: dict[str, Tensor]) -> "PreTrainedModel":
    """A network of transformers without adapters, with these weights."""
    assert model.network is not None
    config = json.loads(model.network.config.to_json_string(use_diff=False))
    with torch.device("meta"):
        network = network_from_config(model.network_options, config)
    network.load_state_dict(state, assign=True)
    network.tie_weights()
    return network


def export_state(folder: Path) -> dict[str, Any]:
    """The content of an export's `proactive.json`.

    Raises:
        UserError: The file is missing, or not one of this project.
    """
    return dict(read_json(folder / EXPORT_STATE, ExportContent, LARGEST_STATE)[1])
