"""`python -m proactive.gate recalibrate`: calibrate a gate on the answers of its user."""

if __name__ == "__main__":
    from proactive.commands import start

    start("gate")

from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.errors import UserError
from models.learning.checkpoint_paths import weights_path
from proactive.assistant.recalibration import read_answers
from proactive.commands import program
from proactive.parser import Parser
from proactive.terminal import quiet_imports, say

if TYPE_CHECKING:
    from jsonargparse import Namespace


def main(arguments: list[str]) -> None:
    """Parse, and carry out the subcommand."""
    parser = Parser(prog=program("gate"), description="Adapt a gate to its user.")
    subcommands = parser.add_subcommands()
    subcommands.add_subcommand("recalibrate", _recalibrate_parser(), help="fit temperature and threshold to answers")
    _recalibrate(parser.parse_args(arguments).recalibrate)


def _recalibrate_parser() -> Parser:
    parser = Parser(prog="gate recalibrate", description="Fit a gate's temperature, and the threshold with the "
        "greatest F1, to the answers in sessions of proactive.live. The weights do not change.")  # fmt: skip
    parser.add_argument("sessions", type=Path, nargs="+", help="Folders of sessions with this gate.")
    parser.add_argument("--gate", type=Path, required=True, help="The gate: a run, checkpoint or export.")
    parser.add_argument("--output", type=Path, required=True, help="The export folder to write, which --gate takes.")
    return parser.with_output_options()


def _recalibrate(options: "Namespace") -> None:
    answers = read_answers(options.sessions)
    path = weights_path(options.gate, "--gate")
    with quiet_imports():
        from models.judging.weights import load_weights
        from models.learning.reward_classifier import RewardClassifier
        from models.reporting.export_folders import export_model, refuse_other_folder

    calibration = answers.calibration()
    refuse_other_folder(options.output)
    gate = load_weights((RewardClassifier,), path, "--gate")
    if gate.digest != answers.weights:
        raise UserError(f"--gate: {gate.source} has other weights than the gate of these sessions", "Give that gate.")
    model, before = gate.model, gate.model.temperature
    model.calibration = calibration
    export_model(model, model.data_class.from_state(gate.state), None, options.output)
    if not options.quiet:
        say(f"temperature {before:.3f} becomes {calibration.temperature:.3f}, fitted on {calibration.rows} answers")
        say(f"the threshold with the greatest F1 is {calibration.f1_threshold:.3f}")
        say(f"{options.output} is the gate with this calibration")
