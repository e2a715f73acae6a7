"""`python -m proactive.export`: write a checkpoint's weights as a folder that transformers loads."""

if __name__ == "__main__":
    from proactive.commands import start

    start("export")

import json
from pathlib import Path
from typing import Any

from datamodules.files.run_folders import METRICS_FILE
from models.learning.checkpoint_paths import holds_export, weights_path
from models.networks.network_options import ExportDtype
from proactive.commands import program
from proactive.parser import Parser
from proactive.terminal import quiet_imports, say


def export(
    checkpoint: Path,
    output: Path,
    dtype: ExportDtype | None = None,
    push: str | None = None,
    public: bool = False,
) -> tuple[Path, str | None]:
    """Write weights, configuration, tokenizer and model card to a folder.

    Args:
        checkpoint: A run folder (its best weights) or a checkpoint, sharded or not.
        output: The folder to write. An earlier export there is replaced; other files in the folder stay.
        dtype: Dtype of the weights, to which they are rounded. If null, the dtype in which the run stored them.
        push: Also push the export to this repository of the Hugging Face hub, ORGANIZATION/NAME. The token is read from
            the environment variable HF_TOKEN, the address of another hub from HF_ENDPOINT. Rows of data and paths of
            this machine are not pushed.
        public: Whether a new repository is public. By default it is private.

    Returns:
        The checkpoint that the weights came from, and the address of the repository.

    Raises:
        UserError: The checkpoint cannot be read, the folder contains something other than an export, or the hub
            refuses the push.
    """
    source = weights_path(checkpoint, "--checkpoint")
    with quiet_imports():
        from models.learning.checkpoint_files import checkpoint_task, load_trained
        from models.reporting.export_folders import export_model, refuse_other_folder
        from models.reporting.hub import push as hub_push
        from models.reporting.hub import refuse_push
        from proactive.tasks import TASKS

    if push is not None:
        refuse_push(push)
    refuse_other_folder(output)
    kind = TASKS[checkpoint_task(source, "--checkpoint", TASKS)].module
    model, state, _ = load_trained((kind,), source, "--checkpoint")
    export_model(model, kind.data_class.from_state(state), _record(source), output, dtype=dtype)
    return source, None if push is None else hub_push(output, push, public)


def _record(source: Path) -> dict[str, Any] | None:
    """The record of the test of these weights; None if their run tested other weights, or none."""
    from models.learning.sharded_files import content_digest

    path = source.parent.parent / METRICS_FILE
    if holds_export(source) or not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if record.get("weights_digest") == content_digest(source) else None


def main(arguments: list[str]) -> None:
    """Parse, export, print the folder."""
    parser = Parser(prog=program("export"), description=(export.__doc__ or "").splitlines()[0])
    parser.add_function_arguments(export, as_group=False)
    parser.add_argument("--quiet", action="store_true", help="Print only the folder.")
    parser.add_argument("--debug", action="store_true", help="Show tracebacks and messages of libraries.")
    options = parser.parse_args(arguments)
    source, pushed = export(options.checkpoint, options.output, options.dtype, options.push, options.public)
    if pushed is not None:
        say(f"pushed to {pushed}", to_stderr=options.quiet)
    say(options.output if options.quiet else f"{options.output} contains the weights of {source}")
