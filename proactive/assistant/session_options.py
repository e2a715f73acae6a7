"""The options of `proactive.live`."""

from pathlib import Path
from typing import Literal

from datamodules.ranges import Count, Fraction, NonNegativeFloat, Port
from models.judging.endpoint import EndpointOptions
from proactive.agent_options import add_agent_options, add_gate_options
from proactive.assistant.deciding import Policy
from proactive.assistant.privacy import PrivacyOptions
from proactive.assistant.rewriting import REWRITING_PROMPT
from proactive.assistant.tools import ToolName
from proactive.endpoints import add_endpoint_options
from proactive.parser import Parser


def session_parser(prog: str) -> Parser:
    """Return the options of a session."""
    parser = Parser(prog=prog, description="Watch events, decide after each whether to offer help, and log "
        "what the user answers. Without options it replays a session of the embedded data.")  # fmt: skip
    add = parser.add_argument
    add("--source", type=str, help="What to watch: the address of an ActivityWatch server, an export of one, or a "
        "trace in either of the published layouts. Default: a session of the embedded data.")  # fmt: skip
    add_agent_options(parser)
    add("--latest-tokens", type=Count, default=8192, help="A model at an endpoint gets as many of the latest events as "
        "have about so many tokens.")  # fmt: skip
    add("--data.root", type=str, help="Root whose traces count as the same session if they have the same file name: "
        "embedded, published or a folder. Default: the root that gate or agent trained on.")  # fmt: skip
    add_gate_options(
        parser,
        "Of several, the one that knows the trace least. Default without a source: the newest run in runs/reward; if "
        "there is none, it is trained first, in about a minute.",
    )
    add("--shadow", action="store_true", help="Log the gate's verdicts, but hold nothing back.")
    add("--gate-fails-open", action="store_true", help="Show offers if the gate fails, instead of nothing.")
    add("--epsilon", type=Fraction, default=0.0, help="Probability of showing an offer that is below the threshold, so "
        "that later figures are unbiased.")  # fmt: skip
    parser.add_class_arguments(Policy, "policy")
    add("--notify", type=Literal["terminal", "page", "desktop", "recorded"], help="How offers are shown: in the "
        "terminal, where y or n answers; on a page of a server on this machine; as notifications of the desktop; or "
        "recorded, where the judgments in the trace answer. Default: recorded for a trace, else terminal.")  # fmt: skip
    add("--port", type=Port, default=0, help="The port of that page; 0 is any that is free.")
    add("--tools", type=ToolName, nargs="+", default=[], help="Tools that an agent may use after its offer was "
        "accepted. Default: none, its text is shown.")  # fmt: skip
    add("--speed", type=NonNegativeFloat, default=60.0, help="For a file: how many times faster it is replayed; 0 "
        "waits for nothing.")  # fmt: skip
    parser.add_class_arguments(PrivacyOptions, "privacy")
    add_endpoint_options(
        parser,
        "rewrite",
        "For ActivityWatch: a model at this endpoint rewrites each event. It gets the latest events.",
        REWRITING_PROMPT,
    )
    add("--allow-remote", action="store_true", help="Allow a model or an ActivityWatch server on another machine. "
        "Such a model gets all events.")  # fmt: skip
    add("--contaminated", action="store_true", help="Allow an agent or gate that trained on the trace, and mark the "
        "session.")  # fmt: skip
    add("--keep", type=Count | None, help="Remove sessions in runs/live that were last written more than this many "
        "days ago.")  # fmt: skip
    parser.add_class_arguments(EndpointOptions, "endpoint", skip={"time_limit"})
    add("--output", type=Path, help="Folder to write. The folder of a stopped session continues it. Default: a new one "
        "in runs/live.")  # fmt: skip
    return parser.with_output_options()
