"""The model card: what model hubs read, the test's figures, and code that gives this project's own probabilities."""

import re
from pathlib import Path
from typing import Any

import yaml

from datamodules.batching.answer_rows import AN_OFFER, SILENCE
from datamodules.batching.rows import RowsDataModule
from datamodules.escaping import on_one_line
from datamodules.files.safe_yaml import NotYamlError, parse_yaml
from datamodules.prompting.tokenizers import SCRATCH
from models.learning.calibration import DECISION
from models.learning.training import BackboneModule
from models.networks.adapters import never_quantized
from models.reporting.templates_folder import TEMPLATES

HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
DOWNLOADED = re.compile(
    r"models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]+/?$", re.ASCII
)  # a folder of the hub's cache
LONG_LINE = 10_000  # of characters: no value takes two lines
OWN_DATA = ("embedded", "published")  # both under the Apache License 2.0
LICENSE_FIELDS = ("license", "license_name", "license_link")


def model_card(model: BackboneModule, data: RowsDataModule, record: dict[str, Any] | None) -> str:
    """A model card in the form that model hubs read; no path of this machine stands in it.

    Args:
        model: What is exported.
        data: What it was trained on.
        record: What its test found out; None if it was not tested.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - Markdown, made of figures and of the run's own options
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert model.network is not None
    backbone, split = str(model.hparams["backbone"]), data.description
    if record is not None:
        split = record["split"]
    return environment.get_template(f"{model.task}_card.md").render(
        metadata=yaml.safe_dump(_metadata(model, data), sort_keys=False, allow_unicode=True, width=LONG_LINE),
        record=record,
        options=model.hparams,
        backbone=shown_name(backbone),
        is_folder=backbone != SCRATCH and hub_id(backbone) is None,
        split=shown_name(data.root) + split.removeprefix(data.root) if split.startswith(data.root) else split,
        adapter_alone=model.exports_adapter,
        not_quantized=never_quantized(model.network, model.head),
        pad_token_id=data.tokenizer.pad_token_id,
        calibration=model.calibration,
        decision=DECISION,
        silence=repr(SILENCE),
        offer=repr(AN_OFFER),
    )


def shown_name(place: str) -> str:
    """The name of a folder without where it is; a hub id, or a name that stands for something else, as it is."""
    is_folder = Path(place).exists() or not HUB_ID.fullmatch(place)
    return hub_id(place) or on_one_line(Path(place).resolve().name if is_folder else place)


def hub_id(backbone: str) -> str | None:
    """The hub id of a backbone; None for a folder that does not say which one it was loaded from."""
    if downloaded := DOWNLOADED.search(Path(backbone).as_posix()):
        return "/".join(downloaded.groups())
    if Path(backbone).exists() or not HUB_ID.fullmatch(backbone):
        return None
    return backbone


def _metadata(model: BackboneModule, data: RowsDataModule) -> dict[str, Any]:
    """What https://huggingface.co/docs/hub/model-cards names."""
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
    """That of the backbone, as its own card says."""
    if backbone == SCRATCH:
        return {"license": "apache-2.0" if data.root in OWN_DATA else "unknown"}
    found = _card_of(backbone)
    fields = {name: str(found[name]) for name in LICENSE_FIELDS if isinstance(found.get(name), str)}
    return fields if "license" in fields else {"license": "unknown"}


def _card_of(backbone: str) -> dict[str, Any]:
    """The metadata of a backbone's own card, if that is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    path = Path(backbone, "README.md")
    if (name := hub_id(backbone)) and not path.is_file():
        cached = try_to_load_from_cache(name, "README.md")
        path = Path(cached) if isinstance(cached, str) else path
    try:
        parts = path.read_text(encoding="utf-8").split("---\n", 2)
        content = parse_yaml(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, UnicodeDecodeError, NotYamlError):
        return {}  # it has none that can be read
    return content if isinstance(content, dict) else {}
