"""Values of options that are no such thing, or out of range."""

from tests.proactive.bad_inputs.case import Case

NUMBERS = {  # option of fit: values that it must refuse
    "model.learning_rate": ["nan", "inf", "-inf", "-1", "many"],
    "model.weight_decay": ["nan", "inf", "-0.1"],
    "model.warmup_ratio": ["nan", "-0.1", "1.1"],
    "model.gradient_clip_norm": ["nan", "inf", "-1", "0"],
    "model.dropout": ["nan", "-0.5", "2"],
    "model.category_weights": ['{"missed_need": -1}', '{"missed_need": "nan"}', '{"missed_need": ".inf"}', "[1]"],
    "data.batch_size": ["0", "-1", "1.5", "1e30"],
    "data.max_length": ["0", "-1", "nan"],
    "data.token_budget": ["0", "-5", "x"],
    "data.micro_batch_size": ["0", "-1"],
    "data.scenes_per_step": ["0", "-1", "5"],
    "data.validation_fraction": ["nan", "0", "1", "5", "-0.1"],
    "data.folds": ["0", "2", "-3", "1000000"],
    "data.fold": ["-1", "99"],
    "data.vocabulary_size": [
        "0",
        "-1",
    ],
    "data.num_workers": ["-1", "4097"],
    "data.format": ["chat", "loud"],
    "data.seed": ["-1", "4294967296", "1.5"],
    "seed_everything": ["-1", "4294967296", "99999999999999999999"],
    "run.checkpoint_every_n_steps": ["0", "-1", "nan"],
    "trainer.max_epochs": ["-2", "x"],
    "trainer.max_steps": ["-2"],
    "trainer.limit_train_batches": ["0", "-1", "1.5", "nan"],
    "trainer.limit_val_batches": ["-1", "1.5", "nan"],
    "trainer.limit_test_batches": ["-1", "nan"],
    "trainer.devices": ["0", "-5"],
}
OTHERS = {  # options of other commands, or of the other task: arguments before the option, and values
    "plan --utilization": ["0", "7", "-1", "nan"],
    "plan --devices": ["0", "-1", "1.5"],
    "plan --memory": ["0GiB", "much", "-1", f"{'9' * 400}GiB"],
    "inspect --folds": ["2", "0", "-1", "10001", "1.5"],
    "inspect --seed": ["-1", "4294967296"],
    "evaluate agent --temperature": ["nan", "inf", "-1", "hot", "101"],
    "evaluate agent --candidates": ["0", "-1", "1001"],
    "evaluate agent --seed": ["-1", "4294967296"],
    "evaluate agent --cost-ratio": ["-1", "nan", "inf"],
    "evaluate agent --judge.attempts": ["0", "1001"],
    "evaluate agent --endpoint.timeout": ["0", "nan", "inf"],
    "evaluate agent --endpoint.concurrency": ["0", "1001"],
    "evaluate agent --agent.answers.max_new_tokens": ["0", "-1"],
    "evaluate reward --data.num_workers": ["-1", "257"],
    "evaluate reward --data.folds": ["2"],
    "fit --run.name": ["", ".", "..", "a/b", "../x", ".hidden", "x" * 61],
    "fit --model.adapter.rank": ["0", "-1", "65537"],
    "fit --model.adapter.dropout": ["1", "nan"],
    "fit --data.token_budget": ["2147483648"],
}
CASES = [
    Case(f"--{name}={value}", "fit", [f"--{name}={value}", *extra], name.rpartition(".")[2])
    for name, values in NUMBERS.items()
    for value in values
    for extra in [["--data.split=published"] if name == "data.validation_fraction" else []]
]
CASES += [
    Case(
        f"{option}={value[:20]}",
        words[0],
        [*words[1:-1], f"{words[-1]}={value}"],
        words[-1].rpartition(".")[2].lstrip("-").replace("cost-", "cost_"),
    )
    for option, values in OTHERS.items()
    for words in [option.split()]
    for value in values
]
