"""Words synthetic support tickets and the two prompts that ask a model about them.

Owns the labels, the prompts and the grammar that turns `phrases.toml` into tickets. The same seed
and edition give the same tickets on every machine. The two editions share a part of their phrases
and hold the rest apart, see the head of `phrases.toml`.
"""

import re
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, Literal

Edition = Literal["training", "shipped"]
Message = dict[str, str]

# Label -> share of the tickets.
LABEL_SHARES = {
    "billing": 17,
    "refund": 12,
    "shipping": 18,
    "account_access": 13,
    "bug_report": 15,
    "feature_request": 10,
    "cancellation": 9,
    "praise": 6,
}
LABELS = tuple(LABEL_SHARES)
URGENCIES = ("low", "normal", "high")
SYSTEM_LABEL = f"Label the support ticket. Answer with one of: {', '.join(LABELS)}."
SYSTEM_JSON = "Label the support ticket. Answer in JSON with label and urgency."
USER_TEMPLATE = "Subject: {subject}\n\n{body}"

PHRASES_PATH = Path(__file__).with_name("phrases.toml")
CHANNEL_SHARES = {"email": 45, "web": 25, "chat": 22, "phone": 8}
TIER_SHARES = {"free": 30, "standard": 50, "business": 20}
TYPO_RATES = {"email": 0.004, "web": 0.008, "chat": 0.025, "phone": 0.0}
HARD_SHARES = {"core": 50, "settled": 27, "aside": 23}
# A settled side topic has to be something that can be settled.
SETTLED_LABELS = ("billing", "refund", "shipping", "account_access", "bug_report", "cancellation")
FIRST_TICKET_AT = datetime(2026, 1, 5, 7, 40, tzinfo=UTC)
BACKGROUND_SHARE = 0.25
CONTEXT_SHARE = 0.45
MEAN_GAP_S = 2700
SHORT_FORMS = {
    "please": "pls",
    "thanks": "thx",
    "because": "bc",
    "you": "u",
    "your": "ur",
    "and": "&",
    "tomorrow": "tmrw",
    "don't": "dont",
    "can't": "cant",
}


@dataclass(frozen=True, slots=True)
class Ticket:
    """One support ticket with the labels it was written for."""

    ticket_id: str
    created_at: str
    """UTC, ISO 8601 with a trailing Z."""
    channel: str
    customer_tier: str
    subject: str
    body: str
    gold_label: str
    gold_urgency: str
    hard: bool
    """Worded so that a second topic, irony or a negation hides the label."""


def user_prompt(subject: str, body: str) -> str:
    """Return the user message that both prompts share."""
    return USER_TEMPLATE.format(subject=subject, body=body)


def chat_messages(system: str, subject: str, body: str) -> list[Message]:
    """Return the chat that asks for a ticket's label."""
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": user_prompt(subject, body)},
    ]


def json_answer(label: str, urgency: str) -> str:
    """Return the answer that `SYSTEM_JSON` asks for."""
    return f'{{"label": "{label}", "urgency": "{urgency}"}}'


def entries_of(node: Any, edition: Edition) -> Any:  # noqa: ANN401 - TOML is a tree of anything
    """Return the tree with each list of strings cut down to one edition's entries."""
    other = {"training": 2, "shipped": 1}[edition]
    if isinstance(node, dict):
        return {key: entries_of(value, edition) for key, value in node.items()}
    if isinstance(node, list) and node and isinstance(node[0], str):
        return [entry for position, entry in enumerate(node) if position % 3 != other]
    if isinstance(node, list):
        return [entries_of(value, edition) for value in node]
    return node


def capitalized(text: str) -> str:
    """Return the text with its first character in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]


class TicketWriter:
    """Writes tickets of one edition, one after the other, from one seed."""

    def __init__(self, edition: Edition, seed: int, hard_share: float) -> None:
        """Load the phrases.

        Args:
            edition: Which part of the phrases to draw from.
            seed: Fixes every ticket that follows.
            hard_share: Share of hard tickets, 0 to 1.
        """
        self._phrases = entries_of(tomllib.loads(PHRASES_PATH.read_text("utf-8")), edition)
        self._random = Random(seed)
        self._hard_share = hard_share
        self._created_at = FIRST_TICKET_AT
        self._values: dict[str, str] = {}

    def write(self, number: int) -> Ticket:
        """Return the next ticket.

        Args:
            number: Becomes the ticket's id, for example 123 for T-000123.
        """
        self._values = {}
        self._created_at += timedelta(seconds=int(self._random.expovariate(1 / MEAN_GAP_S)) + 1)
        label = self._choose(LABEL_SHARES)
        channel = self._choose(CHANNEL_SHARES)
        urgency = self._urgency(label)
        hard = self._random.random() < self._hard_share
        subject, sentences = self._hard(label) if hard else self._easy(label)
        if label != "praise":
            self._insert(sentences, self._cue(urgency))
            self._introduce(sentences, channel)
        return Ticket(
            ticket_id=f"T-{number:06d}",
            created_at=f"{self._created_at:%Y-%m-%dT%H:%M:%SZ}",
            channel=channel,
            customer_tier=self._choose(TIER_SHARES),
            subject=capitalized(self._fill(subject)),
            body=self._body(channel, sentences),
            gold_label=label,
            gold_urgency=urgency,
            hard=hard,
        )

    def _choose(self, shares: dict[str, int]) -> str:
        return self._random.choices(list(shares), list(shares.values()))[0]

    def _chance(self, share: float) -> bool:
        return self._random.random() < share

    def _pick(self, table: str, name: str) -> str:
        entry: str = self._random.choice(self._phrases[table][name])
        return entry

    def _scenario(self, label: str) -> dict[str, list[str]]:
        found = [entry for entry in self._phrases["scenario"] if entry["label"] == label]
        scenario: dict[str, list[str]] = self._random.choice(found)
        return scenario

    def _fill(self, text: str) -> str:
        """Resolve alternatives and slots; a slot keeps its value within a ticket."""
        text = re.sub(r"\[([^]]*)\]", lambda m: self._random.choice(m[1].split("|")), text)
        text = re.sub(r"\{(\w+)\}", lambda m: self._value(m[1]), text)
        return re.sub(r"\ba (?=[AEIO])", "an ", text)

    def _value(self, slot: str) -> str:
        if slot not in self._values:
            value = self._fill(self._pick("slots", "first" if slot == "sender" else slot))
            self._values[slot] = re.sub("%", lambda _: str(self._random.randint(1, 9)), value)
        return self._values[slot]

    def _urgency(self, label: str) -> str:
        if label == "praise":
            return "low"
        if label == "feature_request":
            return self._choose({"low": 40, "normal": 60})
        return self._choose({"low": 22, "normal": 53, "high": 25})

    def _cue(self, urgency: str) -> list[str]:
        """Return the sentences that tell how urgent it is; none is normal, too."""
        if urgency == "normal" and self._chance(0.6):
            return []
        return [self._pick("urgency", urgency)]

    def _insert(self, sentences: list[str], extra: list[str]) -> None:
        """Put the extra sentences last or before the last one, in place."""
        place = len(sentences) - (1 if len(sentences) > 2 and self._chance(0.35) else 0)
        sentences[place:place] = extra

    def _introduce(self, sentences: list[str], channel: str) -> None:
        """Let the sender say something about themselves or the matter, in place."""
        if channel != "chat" and self._chance(BACKGROUND_SHARE):
            sentences.insert(0, self._pick("style", "background"))
        elif self._chance(CONTEXT_SHARE):
            place = self._random.choice((0, 0, len(sentences)))
            sentences.insert(place, self._pick("style", "context"))

    def _easy(self, label: str) -> tuple[str, list[str]]:
        scenario = self._scenario(label)
        details = self._random.sample(scenario["detail"], self._random.choice((0, 1, 1, 1, 2, 2)))
        ask = [self._random.choice(scenario["ask"])] if self._chance(0.88) or not details else []
        statement = self._random.choice(scenario["statement"])
        sentences = [statement, *details, *ask]
        vague = self._chance(0.22)
        subject = self._pick("style", "neutral_subject") if vague else ""
        return subject or self._random.choice(scenario["subject"]), sentences

    def _hard(self, label: str) -> tuple[str, list[str]]:
        kind = self._choose(HARD_SHARES)
        if kind == "core":
            found = [entry for entry in self._phrases["hard"] if entry["label"] == label]
            entry = self._random.choice(found)
            subject = self._random.choice(entry["subject"])
            sentences = [self._random.choice(entry["core"])]
        elif kind == "settled":
            subject, sentences = self._settled(label)
        else:
            subject, sentences = self._aside(label)
        neutral = self._chance(0.5)
        return self._pick("style", "neutral_subject") if neutral else subject, sentences

    def _settled(self, label: str) -> tuple[str, list[str]]:
        """Return a ticket that opens with another, settled topic, under that topic's subject."""
        other = self._scenario(self._random.choice([x for x in SETTLED_LABELS if x != label]))
        scenario = self._scenario(label)
        sentences = [
            self._random.choice(other["statement"]),
            self._pick("pivot", "settled"),
            self._pick("pivot", "turn"),
            self._random.choice(scenario["statement"]),
            self._random.choice(scenario["ask"]),
        ]
        return self._random.choice(other["subject"]), sentences

    def _aside(self, label: str) -> tuple[str, list[str]]:
        """Return a ticket that names other labels' topics only to rule them out."""
        others = self._random.sample([x for x in LABELS if x != label], self._random.choice((1, 2)))
        asides = [self._pick("aside", other) for other in others]
        scenario = self._scenario(label)
        sentences = [
            self._random.choice(scenario["statement"]),
            self._random.choice(scenario["ask"]),
        ]
        place = self._random.choice((0, len(sentences)))
        sentences[place:place] = asides
        subject = self._random.choice(self._scenario(others[0])["subject"])
        return subject, sentences

    def _body(self, channel: str, sentences: list[str]) -> str:
        text = " ".join(capitalized(self._fill(sentence)) for sentence in sentences)
        text = self._misspelled(text, TYPO_RATES[channel])
        match channel:
            case "email":
                return self._email(text)
            case "chat":
                return self._chat(text)
            case "phone":
                start, end = self._pick("style", "voicemail"), self._pick("style", "voicemail_end")
                return f"{self._fill(start)} {text} {self._fill(end)}"
            case _:
                thanks = self._pick("style", "thanks") if self._chance(0.4) else ""
                return f"{text} {thanks}".strip()

    def _email(self, text: str) -> str:
        greeting = self._fill(self._pick("style", "greeting"))
        thanks = f"\n\n{self._pick('style', 'thanks')}" if self._chance(0.45) else ""
        return f"{greeting}\n\n{text}{thanks}\n\n{self._fill(self._pick('style', 'sign_off'))}"

    def _chat(self, text: str) -> str:
        if self._chance(0.6):
            comma = self._random.choice((", ", " - ", " "))
            text = f"{self._pick('style', 'chat_greeting')}{comma}{text}"
        if self._chance(0.8):
            text = text.lower()
        if self._chance(0.45):
            text = re.sub(r"[\w']+", lambda m: SHORT_FORMS.get(m[0], m[0]), text)
        return text.rstrip(".") if self._chance(0.5) else text

    def _misspelled(self, text: str, rate: float) -> str:
        return re.sub(
            r"[a-z]{4,}", lambda m: self._typo(m[0]) if self._chance(rate) else m[0], text
        )

    def _typo(self, word: str) -> str:
        """Return the word with one letter swapped, left out or doubled."""
        at = self._random.randrange(1, len(word) - 1)
        return self._random.choice(
            (
                word[:at] + word[at + 1] + word[at] + word[at + 2 :],
                word[:at] + word[at + 1 :],
                word[:at] + word[at] + word[at:],
            )
        )
