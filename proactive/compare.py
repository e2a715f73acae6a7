"""`python -m proactive.compare`: compare runs and evaluations, on the rows that they have all tested."""

if __name__ == "__main__":
    from proactive.commands import start

    start("compare")

from pathlib import Path

from datamodules.files.run_folders import REPORT_FILE, output_folder
from proactive.commands import program
from proactive.comparing.folders import find_folders
from proactive.parser import Parser
from proactive.tables import show
from proactive.terminal import quiet_imports, say


def main(arguments: list[str]) -> None:
    """Parse, compare, write the folder, print the tables."""
    parser = Parser(prog=program("compare"), description="Compare runs of `fit` and folders of `evaluate agent`. Runs "
        "that differ in seed and fold only are pooled.")  # fmt: skip
    add = parser.add_argument
    add("folders", type=Path, nargs="+", help="Run folders, or folders that contain them.")
    add("--contaminated", action="store_true", help="Also use runs that were tested on what they were trained on. The "
        "result is marked.")  # fmt: skip
    add("--output", type=Path, default=None, help="The folder to write. Default: a new one in runs/compare.")
    options = parser.with_output_options().parse_args(arguments)
    folders = find_folders(options.folders)
    with quiet_imports():
        from proactive.comparing.comparison import compare
        from proactive.comparing.output import (
            COMPARISON_FILE,
            DIFFERENCES_FILE,
            METRICS_TABLE,
            comparison_tables,
            write_comparison,
        )

    record, settings = compare(folders, options.contaminated)
    folder = output_folder(options.output, "compare", COMPARISON_FILE)
    write_comparison(record, settings, folder)
    if not options.quiet:
        show(*comparison_tables(record))
        say(f"{COMPARISON_FILE}, {REPORT_FILE}, {METRICS_TABLE} and {DIFFERENCES_FILE} are in:")
    say(folder)
