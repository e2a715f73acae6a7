"""Refuses mistakes in the options of `proactive.live` before torch is imported and models are loaded."""

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from datamodules.errors import UserError
from datamodules.files.run_folders import runs_in
from proactive.agent_options import KINDS, given_weights, one_of
from proactive.assistant.privacy import PrivacyOptions
from proactive.assistant.source_choice import ChosenSource, read_source

if TYPE_CHECKING:
    from jsonargparse import Namespace

AGENT_HINT = "Give --agent.checkpoint, --agent.url or --agent.baseline."


def checked_source(options: "Namespace") -> ChosenSource | None:
    """Check the options of a session, and return the source that they name; None if they name none.

    Raises:
        UserError: Options contradict each other, a model is remote, or a path contains no weights or no source.
    """
    own = not any(options.agent[kind] for kind in KINDS)
    _refuse_contradictions(options, own)
    privacy = PrivacyOptions(**options.privacy.as_dict())
    chosen = None if options.source is None else read_source(options, privacy)
    if chosen and chosen.recorded is None:
        _refuse_without_trace(options, own)
    elif options.rewrite.url:
        raise UserError("--rewrite.url: the source is a trace, whose events stay as they are", "Leave it out.")
    options.gate = given_weights("--gate", options.gate)
    options.agent.checkpoint = given_weights("--agent.checkpoint", options.agent.checkpoint)
    return chosen


def _refuse_contradictions(options: "Namespace", own: bool) -> None:
    if not own:
        one_of(options.agent, "agent", KINDS)
    gated = bool(options.gate) or options.source is None
    for option, given in {
        "cost-ratio": options.cost_ratio is not None,
        "shadow": options.shadow,
        "gate-fails-open": options.gate_fails_open,
        "epsilon": options.epsilon > 0,
    }.items():
        if given and not gated:
            raise UserError(f"--{option}: there is no gate", "Give a reward classifier with --gate.")
    server = options.source if options.source and "://" in options.source else None
    for option, url, what in (
        ("agent.url", options.agent.url, "which would get all events"),
        ("rewrite.url", options.rewrite.url, "which would get all events"),
        ("source", server, "whose recording would come over the network"),
    ):
        if url and not options.allow_remote and not is_loopback(url):
            raise UserError(
                f"--{option}: {urlsplit(url).hostname} is another machine, {what}",
                "Give --allow-remote to allow it, or an address on this machine.",
            )


def _refuse_without_trace(options: "Namespace", own: bool) -> None:
    """Refuse options that need a trace, for a source that is none."""
    if own:
        raise UserError("agent: there is none, and the source is not a trace with recorded offers", AGENT_HINT)
    if options.agent.traces:
        raise UserError("--agent.traces: the source is not a trace", AGENT_HINT)
    if options.notify == "recorded":
        raise UserError("--notify recorded: the source is not a trace", "Choose another kind of notice.")
    for option, paths in (("--gate", options.gate), ("--agent.checkpoint", options.agent.checkpoint)):
        if (count := sum(len(runs_in(path)) for path in paths or ())) > 1:
            raise UserError(f"{option}: there is no trace to choose one of {count} for", "Give one.")


def is_loopback(url: str) -> bool:
    """Return whether a URL is one of this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
