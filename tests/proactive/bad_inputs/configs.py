"""Configuration files that are none, run away, or name code; given to fit and to plan."""

import yaml

from tests.proactive.bad_inputs.case import PAYLOAD, Case, fifo, write

CALLBACK = "lightning.pytorch.callbacks.LambdaCallback"
CALLABLES = {  # what a function given as an argument could be
    "os.system": {"class_path": "os.system", "init_args": {"command": f"touch {PAYLOAD}"}},
    "a path alone": "os.system",
    "subprocess": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", PAYLOAD]}},
    "pathlib": {"class_path": "pathlib.Path.touch", "init_args": {"self": PAYLOAD}},
    "torch": {"class_path": "torch.load", "init_args": {"f": PAYLOAD}},
    "partial": {"class_path": "functools.partial", "init_args": {"func": "os.system"}},
    "own": {"class_path": "tests.helpers.command", "init_args": {"module": "x"}},
}
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
TEXTS: dict[str, str | bytes] = {
    "a list": "- 1\n",
    "a text": "hello\n",
    "a number": "5\n",
    "nothing": "",
    "a comment alone": "# nothing\n",
    "null": "null\n",
    "tabs": "data:\n\tseed: 1\n",
    "cut": "data:\n  seed: 1\n  root: 'embed",
    "a cut list": "model: {scratch: [1, 2",
    "UTF-16": "data: {seed: 1}\n".encode("utf-16"),
    "latin-1": "data: {root: é}\n".encode("latin-1"),
    "zeros": b"\0" * 100,
    "random bytes": bytes(range(256)),
    "a tag": "data: !!python/object/apply:os.system ['touch PAYLOAD_RAN']\n",
    "a tag of a module": "data: !!python/module:this\n",
    "a tag of a date": "data: {seed: !!timestamp 2024-13-45}\n",
    "a tag of an integer": "data: {seed: !!int x}\n",
    "a tag of bytes": "data: {root: !!binary aGVsbG8=}\n",
    "a set": "data: !!set {seed}\n",
    "an unknown tag": "data: !env SEED\n",
    "two documents": "data: {seed: 1}\n---\ndata: {seed: 2}\n",
    "a list as a name": "? [1, 2]\n: 3\n",
    "20,000 lists": "data: " + "[" * 20_000 + "]" * 20_000 + "\n",
    "20,000 mappings": "data: " + "{a: " * 20_000 + "1" + "}" * 20_000 + "\n",
    "500 lists": "data: " + "[" * 500 + "]" * 500 + "\n",
    "2,000 levels of lines": "".join(f"{' ' * n}a:\n" for n in range(1200)),
    "a bomb": BOMB,
    "an alias within itself": "data: &a [*a]\n",
    "an alias of nothing": "data: *a\n",
    "an integer of 5,000 digits": f"data: {{seed: {'9' * 5000}}}\n",
    "2 MiB": "# " + "x" * 2**21 + "\n",
    "200,000 values": "x: [" + "1," * 200_000 + "]\n",
    "NUL in a text": 'data: {root: "a\\0b"}\n',
    "a lone surrogate": 'data: {root: "\\ud800"}\n',
}
OPTIONS = {  # YAML that is sound, with options that are not: what the message names
    "data: null\n": "data",
    "model: null\n": "model",
    "trainer: null\n": "trainer",
    "run: null\n": "run",
    "data: [1]\n": "data",
    "model: text\n": "model",
    "trainer: 5\n": "trainer",
    "trainer: true\n": "trainer",
    "data: {seed: 2024-01-01}\n": "data.seed",
    "data: {batch_size: 2024-13-45}\n": "data.batch_size",
    "data: {batch_size: true}\n": "data.batch_size",
    "model: {dropout: .nan}\n": "model.dropout",
    "model: {learning_rate: .inf}\n": "model.learning_rate",
    "model: {learning_rate: [1]}\n": "model.learning_rate",
    "model: {category_weights: {missed_need: -1}}\n": "model.category_weights",
    "model: {category_weights: {other: 1}}\n": "model.category_weights",
    "model: {adapter: {rank: 0}}\n": "model.adapter.rank",
    "model: {adapter: {dropout: 1}}\n": "model.adapter.dropout",
    "model: {adapter: text}\n": "model.adapter",
    "data: {nothing: 1}\n": "nothing",
    "nothing: 1\n": "nothing",
    "optimizer: {class_path: torch.optim.SGD}\n": "optimizer",
    "task: nothing\n": "task",
    "task: [agent]\n": "task",
    "task: 2024-01-01\n": "task",
    "run: {name: ''}\n": "run.name",
    "run: {name: ../other}\n": "run.name",
    'run: {name: "a\\nb"}\n': "run.name",
    "run: {name: 5}\n": "run.name",
    "seed_everything: -1\n": "seed_everything",
    "trainer: {limit_test_batches: 0}\n": "trainer.limit_test_batches",
    "trainer: {callbacks: [5]}\n": "trainer.callbacks",
    "trainer: {callbacks: no.such.Class}\n": "trainer.callbacks",
    "trainer: {logger: subprocess.Popen}\n": "trainer.logger",
    "trainer: {plugins: os.system}\n": "trainer.plugins",
}


CASES = [
    *(
        Case(f"{command} with {name}", command, ["--config=c.yaml", "--quiet"], "c.yaml", write("c.yaml", content))
        for command in ("fit", "plan")
        for name, content in TEXTS.items()
    ),
    *(
        Case(f"fit with {text!r}", "fit", ["--config=c.yaml"], named, write("c.yaml", text))
        for text, named in OPTIONS.items()
    ),
    *(Case(f"plan with {text!r}", "plan", ["--config=c.yaml"], named, write("c.yaml", text))
      for text, named in list(OPTIONS.items())[::4]),
    *(
        Case(
            f"a function as an argument: {name}",
            "fit",
            ["--config=c.yaml"],
            "trainer.callbacks",
            write(
                "c.yaml",
                yaml.safe_dump(
                    {"trainer": {"callbacks": [{"class_path": CALLBACK, "init_args": {"on_train_start": function}}]}}
                ),
            ),
        )
        for name, function in CALLABLES.items()
    ),
    Case("a named pipe", "fit", ["--config=c.yaml"], "c.yaml", fifo("c.yaml")),
    Case("a folder", "fit", ["--config=."], "--config", None),
    Case("a file that is not there", "plan", ["--config=c.yaml"], "c.yaml", None),
    Case("a bomb as a value", "fit", [f"--model.scratch={{{BOMB.replace(chr(10), ', ')}}}"], "model.scratch", None),
    Case("nesting as a value", "fit", [f"--model.scratch={'[' * 20_000}{']' * 20_000}"], "model.scratch", None),
    Case("a tag as a value", "fit", ["--model.scratch=!!python/name:os.system"], "model.scratch", None),
    Case("null for a group", "fit", ["--data=null"], "data", None),
    Case(
        "a configuration with dates and numbers that are fine",
        "plan",
        ["--config=c.yaml", "--quiet", "--data.root={root}", "--data.vocabulary_size=300"],
        "",
        write("c.yaml", "data: {seed: 1, folds: 3}\nmodel: {learning_rate: 1e-3}\n"),
        accepted=True,
    ),
]  # fmt: skip
