"""Cases from other people's bug reports, each with its right answer; their inputs lie beside the checkout.

The pretrained models that the cases name are replaced by small ones of the same kind: an instruct decoder whose end
token also pads, and an encoder of the BERT type.
"""

import csv
import json
import math
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from proactive import evaluate, fit
from tests.helpers import ROOT
from tests.patience import HANG
from tests.proactive.case_modules import case_modules
from tests.proactive.conftest import Ended

CASES = ROOT.parent / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"the cases are not at {CASES}")
CHAT_FORMAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMALL = ["--data.batch_size=8", "--data.scenes_per_step=2", "--quiet", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer such as SmolLM2-Instruct's: a chat format, and an end token that also pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    text = (CASES / "told.jsonl").read_text(encoding="utf-8").splitlines()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=1200, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_FORMAT
    folder = tmp_path_factory.mktemp("instruct")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(instruct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a case, with the inputs that several share and the small backbones."""
    for name in ("root", "told.jsonl", "21-prompt-ends-in-pad", "26-empty-answer", "24-half-surrogate", "31-formats"):
        (tmp_path / name).symlink_to(CASES / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    script("make_tiny.py", instruct, monkeypatch=monkeypatch)
    return tmp_path


def script(name: str, *arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a case's script in this process; an assertion of its own that fails is an error."""
    for module_name, module in case_modules().items():
        monkeypatch.setitem(sys.modules, module_name, module)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(CASES / name), run_name="__main__")


@pytest.fixture
def server() -> Iterator[str]:
    """The address of the cases' endpoint."""
    process = subprocess.Popen([sys.executable, CASES / "server.py"])
    end = time.monotonic() + HANG
    while True:
        assert process.poll() is None
        try:
            socket.create_connection(("127.0.0.1", 18765)).close()
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.05)
    yield "http://127.0.0.1:18765"
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    "name",
    [
        "01-answer-inside-thought",
        "03-verdict-from-cut-off-thought",
        "10-chat-template-in-cache",
        "12-window-not-in-config-names",
        "14-rope-by-longest",
        "27-other-number-of-classes",
        "28-text-config",
    ],
)
def test_the_case_checks_itself(name: str, place: Path, instruct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "10-chat-template-in-cache":
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    script(f"{name}/check.py", instruct, monkeypatch=monkeypatch)


def endpoints(server: str, mode: str, *options: str) -> list[str]:
    judge = [f"--judge.url={server}/ok/v1", "--judge.model=j"]
    agent = [f"--agent.url={server}/{mode}/v1", "--agent.model=m"]
    return ["agent", "--data.root=root", *agent, *judge, "--endpoint.retries=1", "--output=out", *options]


def test_endpoints_that_misbehave(
    place: Path, server: str, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NL", "sk-SECRET-abcdef-123456\n")
    ended = call(evaluate.main, *endpoints(server, "ok", "--agent.key_variable=NL"))
    assert ended.code == 0
    assert "SECRET" not in ended.out + ended.err
    assert not any(
        "SECRET" in path.read_text(errors="replace") for path in (place / "out").rglob("*") if path.is_file()
    )
    for mode, figure in {"parts": "tn", "think": "tn"}.items():
        options = endpoints(server, mode)
        options[options.index("--output=out")] = f"--output={mode}"
        assert call(evaluate.main, *options).code == 0
        figures = json.loads((place / mode / "metrics.json").read_text())["figures"]
        assert figures[figure] == figures["events"] == 3
    for mode, said in {"err200": "model is overloaded, try later", "later": "24 hours", "sse": "stream"}.items():
        options = [option.replace("--output=out", f"--output={mode}") for option in endpoints(server, mode)]
        ended = call(evaluate.main, *options)
        assert ended.code == 2, mode
        assert said in ended.err.splitlines()[0], ended.err


def test_08_a_learning_rate_on_a_resume_is_used(place: Path, call: Callable[..., Ended]) -> None:
    scratch = (
        "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}"
    )
    steps = ["--trainer.max_epochs=6", "--trainer.max_steps=10", "--run.name=lr", "--run.checkpoint_every_n_steps=5"]
    begun = call(fit.main, "--data.root=root", "--model.scratch", scratch, *SMALL, *steps, "--model.learning_rate=1e-3")
    assert begun.code == 0, begun.err
    last = "--ckpt_path=runs/lr/0/checkpoints/last.ckpt"
    ended = call(fit.main, last, "--trainer.max_steps=20", "--model.learning_rate=1e-5", "--quiet")
    if ended.code == 0:
        with Path("runs/lr/0/logs/metrics.csv").open() as file:
            rates = [float(rate) for row in csv.DictReader(file) if (rate := row.get("train/learning_rate"))]
        assert rates
        assert max(rates) <= 1e-5
        assert "learning_rate: 1.0e-05" in Path("runs/lr/0/config.yaml").read_text()
    else:
        assert "learning_rate" in ended.err.splitlines()[0]


def test_16_an_adapter_on_a_tied_head_is_refused(place: Path, call: Callable[..., Ended]) -> None:
    ended = call(
        fit.main,
        "--task=agent",
        "--model.backbone=tinyA",
        "--model.adapter.rank=4",
        "--model.adapter.targets=[q_proj, v_proj, lm_head]",
        "--model.adapter.merge=true",
        "--data.conversations=[told.jsonl]",
        "--data.annotated=false",
        "--quiet",
    )
    assert ended.code == 2
    assert "lm_head" in ended.err.splitlines()[0]


def test_18_an_adapter_of_an_encoder_loads_as_peft_does(
    place: Path, instruct: Path, call: Callable[..., Ended]
) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(instruct)
    config = AutoConfig.for_model(
        "bert",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained("encoder")
    tokenizer.save_pretrained("encoder")
    options = ["--model.backbone=encoder", "--model.adapter.rank=4", "--model.learning_rate=1e-3", "--run.name=a"]
    ended = call(fit.main, "--data.root=root", *options, *SMALL, "--data.max_length=160", "--trainer.max_epochs=1")
    assert ended.code == 0, ended.err
    saved = json.loads(Path("runs/a/0/export/adapter_config.json").read_text())["modules_to_save"]
    assert "dropout" not in saved
    base = AutoModelForSequenceClassification.from_pretrained("encoder", num_labels=2)
    loaded = PeftModel.from_pretrained(base, "runs/a/0/export")
    assert math.isfinite(float(loaded(input_ids=torch.tensor([[5, 6]])).logits.sum()))


def test_20_experts_without_adapters_cause_a_warning(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    script("20-experts-not-quantized/check.py", monkeypatch=monkeypatch)
    assert "mixtral" in capsys.readouterr().out
    assert "get no adapter and are not quantized" in caplog.text


def test_21_a_prompt_that_ends_in_the_padding_token(
    place: Path, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.backbone=tinyA", "--data.prompt=21-prompt-ends-in-pad/prompt.yaml", "--run.name=padeos"]
    more = ["--model.learning_rate=5e-3", "--trainer.max_epochs=2"]
    assert call(fit.main, "--data.root=root", *options, *more, *SMALL).code == 0
    script("21-prompt-ends-in-pad/compare.py", "runs/padeos/0/export", monkeypatch=monkeypatch)
    pairs = [tuple(map(float, line.split())) for line in capsys.readouterr().out.splitlines() if line[:2] == "0."]
    assert len(pairs) == 5
    assert all(ours == pytest.approx(theirs, abs=2e-4) for ours, theirs in pairs)


def test_22_and_32_learned_tokens_of_a_conversation(
    place: Path, instruct: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script("22-end-learned-after-user/check.py", instruct, monkeypatch=monkeypatch)
    shown = capsys.readouterr().out.strip()
    assert shown.count("[<|im_end|>]") == 1
    assert shown.rstrip("Ċ").endswith("[<|im_end|>]")
    script("32-template-edits-content/check.py", instruct, monkeypatch=monkeypatch)
    ours, theirs = capsys.readouterr().out.strip().splitlines()[-2:]
    assert ours.strip("'").startswith("<|im_start|>user\\nA<|im_end|>")
    assert theirs.strip("'").removesuffix("\\n") == ours.strip("'").removesuffix("\\n")


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("24-half-surrogate/lines.jsonl", "line 1"),
        ("26-empty-answer/told.jsonl", "line"),
        ("31-formats/toolcalls.jsonl", "tool"),
    ],
)
def test_conversations_of_other_kinds_are_named(file: str, named: str, place: Path, call: Callable[..., Ended]) -> None:
    options = ["--task=agent", "--model.backbone=tinyA", f"--data.conversations=[{file}]", "--data.annotated=false"]
    ended = call(fit.main, *options)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    what = ended.err.splitlines()[0]
    assert Path(file).name in what
    assert named in ended.err


def test_29_updates_that_bfloat16_loses_cause_a_warning(place: Path, call: Callable[..., Ended]) -> None:
    options = ["--model.backbone=tinyA", "--model.dtype=bfloat16", "--trainer.precision=bf16-true"]
    more = ["--model.learning_rate=1e-5", "--model.optimizer=adamw", "--trainer.max_steps=1"]
    ended = call(fit.main, "--data.root=root", *options, *more, *[option for option in SMALL if option != "--quiet"])
    assert "rounding to 16 bits undoes steps of" in ended.out + ended.err
