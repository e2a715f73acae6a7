"""The embedded data: simulated sessions in which the need for help follows learnable rules.

A scene is one session on one topic. The user has a hidden state (stuck, exploring, flowing, away). Only the latest
events indicate it, and some events fit any state. After each event there are candidate proposals: null, or help with
an obstacle or a search, on this topic or another one. Three simulated annotators, each with a bias, accept or reject
a proposal depending on the current state, the kind of help, and the topic. So neither the history nor the proposal
alone determines a row. Help is needed after an event if most annotators reject silence there. This is drawn once per
history, so all rows of a history and its trace agree. All draws follow from one seed, and the data stays in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from datamodules.corpus.records import AnnotatedRow, Event, TestStep, TraceProposals

SCENES = 72
TEST_SCENES = 14
EVENTS_PER_SCENE = 8
PROPOSALS_PER_EVENT = 4
FIRST_EPOCH_SECOND = 1_717_300_000
Topic = tuple[str, str]  # the object of a session, and its location


@dataclass(frozen=True)
class Domain:
    """The vocabulary of one kind of session; `{thing}` and `{place}` are replaced with the topic and its location."""

    apps: Sequence[str]
    topics: Sequence[Topic]
    events: dict[str, Sequence[str]]  # by hidden state; "any" fits all states
    proposals: dict[str, Sequence[str]]  # by kind of help: "obstacle" or "search"


CODING = Domain(
    apps=("the editor", "the terminal", "the code review page"),
    topics=(
        ("the CSV parser", "parse_rows.py"),
        ("the login form", "login.ts"),
        ("the retry loop", "client.go"),
        ("the image cache", "cache.rs"),
    ),
    events={
        "stuck": (
            "The user runs {place} and the same error about {thing} appears again.",
            "The user undoes the last three edits in {place}.",
            "The user adds yet another print statement to {place}.",
            "The user stares at the failing test of {thing} for two minutes.",
        ),
        "exploring": (
            "The user opens the documentation of a library for {thing}.",
            "The user compares two forum answers about {thing}.",
            "The user browses example projects that contain {thing}.",
        ),
        "flowing": (
            "The user types several functions into {place} without a pause.",
            "The user runs the tests of {thing} and all pass.",
            "The user commits {place} with a clear message.",
        ),
    },
    proposals={
        "obstacle": (
            "Explain the error that {thing} raises and propose a fix in {place}.",
            "Find the line in {place} that breaks {thing}.",
            "Write a minimal test that reproduces the failure of {thing}.",
        ),
        "search": (
            "Summarize the documentation that matters for {thing}.",
            "Compare libraries that provide {thing}.",
            "Collect three short examples of {thing}.",
        ),
    },
)
WRITING = Domain(
    apps=("the word processor", "the notes app", "the reference manager"),
    topics=(
        ("the grant application", "proposal.docx"),
        ("the travel essay", "essay.odt"),
        ("the quarterly report", "report.docx"),
        ("the wedding speech", "speech.txt"),
    ),
    events={
        "stuck": (
            "The user deletes the opening sentence of {thing} for the fourth time.",
            "The user moves the same paragraph of {place} up and down.",
            "The user types a heading in {place} and removes it at once.",
            "The user looks up a synonym for the same word in {thing} again.",
        ),
        "exploring": (
            "The user reads an article that could support {thing}.",
            "The user highlights quotations for {thing}.",
            "The user opens several sources about {thing} in new tabs.",
        ),
        "flowing": (
            "The user writes two full paragraphs of {thing} without a pause.",
            "The user finishes a section of {place} and goes on to the next.",
            "The user saves {place} after a steady stretch of typing.",
        ),
    },
    proposals={
        "obstacle": (
            "Draft an opening sentence for {thing}.",
            "Rewrite the difficult paragraph of {place} in a plainer way.",
            "Suggest an outline that brings {thing} forward.",
        ),
        "search": (
            "Summarize the open sources for {thing}.",
            "List further articles that support {thing}.",
            "Arrange the highlighted quotations for {thing} by subject.",
        ),
    },
)
DAILY_LIFE = Domain(
    apps=("the browser", "the calendar", "the messaging app"),
    topics=(
        ("the train to the coast", "the trip list"),
        ("the birthday dinner", "the guest list"),
        ("the electricity contract", "the household folder"),
        ("the bicycle repair", "the to-do list"),
    ),
    events={
        "stuck": (
            "The user fills in the form for {thing} and it is refused again.",
            "The user goes back and forth between two dates for {thing}.",
            "The user re-reads {place} and sighs into the microphone.",
            "The user enters the same question about {thing} in other words.",
        ),
        "exploring": (
            "The user compares offers for {thing}.",
            "The user reads reviews about {thing}.",
            "The user looks at a map in connection with {thing}.",
        ),
        "flowing": (
            "The user ticks off two items in {place}.",
            "The user confirms a step of {thing} and thanks the other side.",
            "The user adds a finished entry on {thing} to {place}.",
        ),
    },
    proposals={
        "obstacle": (
            "Fill in the refused form for {thing} with the right values.",
            "Weigh up the open choices about {thing} and name the better one.",
            "Write to the support team about {thing}.",
        ),
        "search": (
            "Put the offers for {thing} into one table.",
            "Summarize the reviews about {thing}.",
            "Look for a cheaper way to arrange {thing}.",
        ),
    },
)
DOMAINS = {"coding": CODING, "writing": WRITING, "daily": DAILY_LIFE}
AWAY_EVENTS = (
    "The screen locks after a time without input.",
    "The user starts a video call and leaves every other window.",
    "The user pauses the music and no key is pressed for a while.",
)
ANY_STATE_EVENTS = (
    "The user switches to {app}.",
    "The user scrolls through {place}.",
    "The user opens {place} in {app}.",
    "The user moves the pointer across {app}.",
)
STATES = {"stuck": 0.35, "exploring": 0.3, "flowing": 0.25, "away": 0.1}  # with their probabilities
STAY = 0.5  # probability that the hidden state stays after an event
SHOWS_STATE = 0.85  # probability that an event indicates the state
ON_TOPIC = 0.8
NULL_PROPOSAL = 0.15
ACCEPTS_TEXT = {  # P(one annotator accepts a proposal on topic), by state and kind of help
    ("stuck", "obstacle"): 0.93,
    ("stuck", "search"): 0.75,
    ("exploring", "obstacle"): 0.45,
    ("exploring", "search"): 0.9,
    ("flowing", "obstacle"): 0.1,
    ("flowing", "search"): 0.12,
    ("away", "obstacle"): 0.05,
    ("away", "search"): 0.05,
}
ACCEPTS_OFF_TOPIC = 0.06
ACCEPTS_NULL = {"stuck": 0.1, "exploring": 0.35, "flowing": 0.92, "away": 0.95}
ANNOTATOR_BIAS = (-0.05, 0.0, 0.05)


def simulate(seed: int = 0) -> tuple[list[AnnotatedRow], list[AnnotatedRow], dict[str, list[TestStep]]]:
    """Simulate `SCENES` sessions.

    Args:
        seed: The same seed gives the same data.

    Returns:
        The annotated rows of the first scenes, those of the last `TEST_SCENES`, and the traces of the last scenes with
        the proposals that fit each event.
    """
    random = Random(seed)
    train: list[AnnotatedRow] = []
    test: list[AnnotatedRow] = []
    traces: dict[str, list[TestStep]] = {}
    for number in range(SCENES):
        name = list(DOMAINS)[number % len(DOMAINS)]
        rows, steps = _scene(random, DOMAINS[name], number)
        if number < SCENES - TEST_SCENES:
            train += rows
        else:
            test += rows
            traces[f"{name}_{number}.json"] = steps
    return train, test, traces


def _scene(random: Random, domain: Domain, number: int) -> tuple[list[AnnotatedRow], list[TestStep]]:
    topic = domain.topics[number // len(DOMAINS) % len(domain.topics)]  # each in the same number of scenes
    state = draw_state(random)
    second = FIRST_EPOCH_SECOND + number * 86_400.0
    as_words = random.random() < 0.3
    history: tuple[Event, ...] = ()
    rows: list[AnnotatedRow] = []
    steps: list[TestStep] = []
    for _ in range(EVENTS_PER_SCENE):
        event = Event(time=_time(second, as_words), event=draw_event(random, domain, topic, state))
        history = (*history, event)
        silence = annotate(random, domain, topic, state, None)
        rows += [_row(random, domain, topic, state, history, silence) for _ in range(PROPOSALS_PER_EVENT)]
        apt = "search" if state == "exploring" else "obstacle"
        fitting = [] if majority(silence) else [_fill(text, topic) for text in domain.proposals[apt]]
        steps.append(
            TestStep(
                observation=event,
                agent_response=TraceProposals(candidate_task=tuple(fitting)),
                task_status=bool(fitting),
            )
        )
        second += random.uniform(5, 400)
        state = next_state(random, state)
    unique = {(row.history_digest, row.proposal): row for row in rows}  # distinct proposals after a history
    return list(unique.values()), steps


def draw_state(random: Random) -> str:
    """Draw a hidden state with the probabilities of `STATES`."""
    return random.choices(list(STATES), list(STATES.values()))[0]


def next_state(random: Random, state: str) -> str:
    """Draw the hidden state after one more event."""
    return draw_state(random) if random.random() > STAY else state


def draw_event(random: Random, domain: Domain, topic: Topic, state: str) -> str:
    """Draw an event of a user in a hidden state."""
    if random.random() > SHOWS_STATE:
        template = random.choice(ANY_STATE_EVENTS)
    else:
        template = random.choice(AWAY_EVENTS if state == "away" else domain.events[state])
    return _fill(template, topic, random.choice(domain.apps))


def draw_proposal(random: Random, domain: Domain, topic: Topic) -> str | None:
    """Draw a proposal on the topic or on another domain's, or null."""
    if random.random() < NULL_PROPOSAL:
        return None
    helps_with = random.choice(("obstacle", "search"))
    on_topic = random.random() < ON_TOPIC
    other = random.choice([other for other in DOMAINS.values() if other.topics != domain.topics])
    source, subject = (domain, topic) if on_topic else (other, random.choice(other.topics))
    return _fill(random.choice(source.proposals[helps_with]), subject)


def annotate(random: Random, domain: Domain, topic: Topic, state: str, proposal: str | None) -> tuple[bool, ...]:
    """Draw for each annotator whether they accept a proposal of `draw_proposal` in a hidden state."""
    chance = _acceptance(domain, topic, state, proposal)
    return tuple(random.random() < chance + bias for bias in ANNOTATOR_BIAS)


def majority(annotation: tuple[bool, ...]) -> bool:
    """Return whether most annotators accept."""
    return sum(annotation) * 2 > len(annotation)


def _acceptance(domain: Domain, topic: Topic, state: str, proposal: str | None) -> float:
    if proposal is None:
        return ACCEPTS_NULL[state]
    for helps_with, templates in domain.proposals.items():
        if proposal in (_fill(template, topic) for template in templates):
            return ACCEPTS_TEXT[state, helps_with]
    return ACCEPTS_OFF_TOPIC


def _row(
    random: Random,
    domain: Domain,
    topic: Topic,
    state: str,
    history: tuple[Event, ...],
    silence: tuple[bool, ...],
) -> AnnotatedRow:
    """Draw a row; `silence` holds the annotators' verdicts on null after this history."""
    proposal = draw_proposal(random, domain, topic)
    annotation = silence if proposal is None else annotate(random, domain, topic, state, proposal)
    return AnnotatedRow.model_validate(
        {
            "obs": history,
            "pred_task": proposal,
            "valid": majority(annotation),
            "help_needed": not majority(silence),
            "annotation": annotation,
        }
    )


def _fill(template: str, topic: Topic, app: str = "") -> str:
    thing, place = topic
    return template.format(thing=thing, place=place, app=app)


def _time(second: float, as_words: bool) -> str:
    if not as_words:
        return f"{second:.0f}"
    minutes = int(second - FIRST_EPOCH_SECOND) // 60
    day, (hour, minute) = minutes // 1440 + 1, divmod(minutes % 1440, 60)
    return f"Day {day}, {(hour - 1) % 12 + 1}:{minute:02d} {'AM' if hour < 12 else 'PM'}"
