"""`python -m proactive.evaluate reward|agent`: test a trained model, and compare it with published metrics."""

if __name__ == "__main__":
    from proactive.commands import start

    start("evaluate")

import json
from typing import TYPE_CHECKING

from datamodules.errors import UserError
from datamodules.files.writing import write_atomically
from models.learning.checkpoint_paths import weights_path
from proactive.commands import program
from proactive.evaluation.evaluation_options import agent_parser, refuse_mistakes, reward_parser
from proactive.parser import Parser
from proactive.tables import reward_tables, show
from proactive.terminal import quiet_imports

if TYPE_CHECKING:
    from jsonargparse import Namespace


def main(arguments: list[str]) -> None:
    """Parse, and run a subcommand."""
    parser = Parser(prog=program("evaluate"), description="Test a trained model.")
    subcommands = parser.add_subcommands()
    subcommands.add_subcommand("reward", reward_parser(), help="a reward classifier")
    subcommands.add_subcommand("agent", agent_parser(), help="an agent, by the verdicts of a judge")
    options = parser.parse_args(arguments)
    if options.subcommand == "agent":
        refuse_mistakes(options.agent)
        with quiet_imports():
            from proactive.evaluation.agent_command import evaluate_agent_command

        evaluate_agent_command(options.agent, arguments)
    else:
        _evaluate_reward_command(options.reward)


def _evaluate_reward_command(options: "Namespace") -> None:
    """Evaluate, write the metrics, print the tables."""
    if options.output and options.output.is_dir():
        raise UserError(f"--output: {options.output} is a folder", "Give the path of a file.")
    checkpoint = weights_path(options.checkpoint, "--checkpoint")
    with quiet_imports():
        from proactive.evaluation.reward_evaluation import evaluate_reward

    record = evaluate_reward(checkpoint, options.data.as_dict(), options.quiet)
    if options.output:
        write_atomically(options.output, json.dumps(record, indent=2) + "\n")
    if not options.quiet:
        show(*reward_tables(record))
