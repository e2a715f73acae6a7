"""Rewrites the sentences of a source with a model behind an endpoint."""

import logging
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from datamodules.corpus.records import Event
from datamodules.corpus.replies import without_reasoning
from datamodules.errors import UserError
from datamodules.prompting.chat_prompts import ChatPrompt
from models.judging.chat_client import ChatClient
from proactive.assistant.observations import Cursor, Happened, Observation, Source
from proactive.assistant.privacy import redacted

REWRITING_PROMPT = Path(__file__).with_name("rewriting_prompt.yaml")
CONTEXT = 5  # latest events that the model gets, with the one to rewrite
BEGINNING = "The user "
log = logging.getLogger("proactive")


class RewrittenSource(Source):
    """Yields the observations of a source, with the sentences of its events rewritten.

    A sentence is not changed if the endpoint fails, or if its answer does not begin with "The user". A warning says so.

    Args:
        source: The source.
        client: The client of the model. It must be open while observations are read.
        prompt: The prompt.
    """

    def __init__(self, source: Source, client: ChatClient, prompt: ChatPrompt) -> None:
        self.source = source
        self.client = client
        self.prompt = prompt

    @property
    def name(self) -> str:
        return self.source.name

    def describe(self) -> dict[str, Any]:
        return {**self.source.describe(), "rewriting": {**self.client.endpoint.settings, "prompt": self.prompt.text}}

    async def observations(self, cursor: Cursor | None = None) -> AsyncGenerator[Observation, None]:
        latest: deque[Event] = deque(maxlen=CONTEXT)
        async with aclosing(self.source.observations(cursor)) as observations:
            async for found in observations:
                if isinstance(found, Happened):
                    latest.append(found.event)
                    found = replace(found, event=await self._rewritten(list(latest)))
                yield found

    async def _rewritten(self, latest: list[Event]) -> Event:
        event = latest[-1]
        try:
            reply = await self.client.ask(self.prompt.messages(latest), "rewriting an event")
        except UserError as error:
            log.warning(f"an event stays as it is: {error.what}")
            return event
        lines = (without_reasoning(reply or "") or "").strip().splitlines()
        sentence = redacted(lines[-1].strip(" \"'")) if lines else ""
        if not sentence.startswith(BEGINNING):
            log.warning(
                f"an event stays as it is: the reply of {self.client.endpoint.model} is no sentence on the user"
            )
            return event
        return Event(time=event.time, event=sentence)
