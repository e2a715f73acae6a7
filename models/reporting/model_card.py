"""The model card: metadata for model hubs, the test's metrics, and code that computes the same probabilities."""

import re
from pathlib import Path
from typing import Any

import yaml

from datamodules.backbones.packaged import GGUF_SUFFIX, PACKAGED
from datamodules.batching.answer_rows import NULL_ANSWER, OFFER_ANSWER
from datamodules.batching.rows import RowsDataModule
from datamodules.escaping import on_one_line
from datamodules.files.safe_yaml import NotYamlError, parse_yaml
from datamodules.prompting.tokenizers import SCRATCH
from models.learning.calibration import DECISION
from models.learning.training import BackboneModule
from models.networks.adapters import never_quantized
from models.reporting.templating import template_environment

HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
DOWNLOADED = re.compile(
    r"models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]+/?$", re.ASCII
)  # a folder of the hub's cache
LONG_LINE = 10_000  # characters, so that no value is wrapped
OWN_DATA = ("embedded", "published")  # under the Apache License 2.0
LICENSE_FIELDS = ("license", "license_name", "license_link")


def model_card(
    model: BackboneModule, data: RowsDataModule, record: dict[str, Any] | None, dtype: str | None = None
) -> str:
    """A model card in the format of model hubs. It contains no path of this machine.

    Args:
        model: The exported model.
        data: The data of its training.
        record: The `run_record` of its test; None without a test.
        dtype: The dtype to which the export rounds the weights; None if it does not round them.
    """
    # Markdown of metrics and of the run's own options, so nothing is escaped.
    environment = template_environment(autoescape=False, trim_blocks=True, lstrip_blocks=True)
    assert model.network is not None
    lead = data.chat.lead if data.chat else ""
    backbone, split = str(model.hparams["backbone"]), data.description
    if record is not None:
        split = record["split"]
    return environment.get_template(model.card_template).render(
        metadata=yaml.safe_dump(_metadata(model, data), sort_keys=False, allow_unicode=True, width=LONG_LINE),
        record=record,
        options={**model.hparams, "dtype": dtype or model.hparams["dtype"]},
        rounded_to=dtype if dtype != model.hparams["dtype"] else None,
        backbone=shown_name(backbone),
        backbone_place=backbone_place(backbone),
        is_local=backbone != SCRATCH and hub_id(backbone) is None,
        split=shown_name(data.root) + split.removeprefix(data.root) if split.startswith(data.root) else split,
        adapter_alone=model.exports_adapter,
        not_quantized=never_quantized(model.network, model.head),
        pad_token_id=data.tokenizer.pad_token_id,
        calibration=model.calibration,
        decision=DECISION,
        chat=data.chat,
        silence=repr(lead + NULL_ANSWER),
        offer=repr(lead + OFFER_ANSWER),
    )


def shown_name(place: str) -> str:
    """The name of a folder without its path. Hub ids and other names stay unchanged."""
    is_folder = Path(place).exists() or not HUB_ID.fullmatch(place)
    return hub_id(place) or on_one_line(Path(place).resolve().name if is_folder else place)


def backbone_place(backbone: str) -> str:
    """What `adapter_config.json` names as the backbone of an adapter, in words."""
    packaged = PACKAGED.get(backbone)
    path = packaged.place if packaged else backbone
    file = f"`{on_one_line(Path(path).name)}`" + (f" of the Python package {packaged.package}" if packaged else "")
    if path.endswith(GGUF_SUFFIX):
        return f"the folder to which {file} was converted"
    if packaged:
        return f"{file}, a folder"
    return f"`{shown_name(backbone)}`" + ("" if hub_id(backbone) else ", a folder")


def hub_id(backbone: str) -> str | None:
    """The hub id of a backbone; None for a folder outside the hub's cache, and for a GGUF file."""
    if backbone in PACKAGED:
        return PACKAGED[backbone].hub_id
    if downloaded := DOWNLOADED.search(Path(backbone).as_posix()):
        return "/".join(downloaded.groups())
    if Path(backbone).exists() or backbone.endswith(GGUF_SUFFIX) or not HUB_ID.fullmatch(backbone):
        return None
    return backbone


def _metadata(model: BackboneModule, data: RowsDataModule) -> dict[str, Any]:
    """Metadata as in https://huggingface.co/docs/hub/model-cards."""
    backbone = str(model.hparams["backbone"])
    base = {} if backbone == SCRATCH else {"base_model": shown_name(backbone)}
    tags = [*model.card_tags, "proactive-assistant", "proactivebench", *(["lora"] if model.exports_adapter else [])]
    return {
        **base,
        **_license(backbone, data),
        "library_name": "peft" if model.exports_adapter else "transformers",
        "pipeline_tag": model.pipeline,
        "tags": tags,
    }


def _license(backbone: str, data: RowsDataModule) -> dict[str, str]:
    """The license of the backbone, from its model card."""
    if backbone == SCRATCH:
        return {"license": "apache-2.0" if data.root in OWN_DATA else "unknown"}
    if backbone in PACKAGED:
        return {"license": PACKAGED[backbone].license}
    found = _card_of(backbone)
    fields = {name: str(found[name]) for name in LICENSE_FIELDS if isinstance(found.get(name), str)}
    return fields if "license" in fields else {"license": "unknown"}


def _card_of(backbone: str) -> dict[str, Any]:
    """The metadata of a backbone's model card; empty if the card is not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    path = Path(backbone, "README.md")
    if (name := hub_id(backbone)) and not path.is_file():
        cached = try_to_load_from_cache(name, "README.md")
        path = Path(cached) if isinstance(cached, str) else path
    try:
        parts = path.read_text(encoding="utf-8").split("---\n", 2)
        content = parse_yaml(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, UnicodeDecodeError, NotYamlError):
        return {}  # no readable card
    return content if isinstance(content, dict) else {}
