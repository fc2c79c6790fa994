"""What the demo asks and decides: its documents, questions and answers. Data only; used by `play`.

Invariant: every question but the last is answered in the documents that the repository ships.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from millpond.errors import NotFound

FLOW = "support.answer"
FLOW_MODULE = "examples.support_answer"
BASE = "demo"

Decision = Literal["approve", "edit", "write"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A customer's question, what the human does with the draft, and the text they write."""

    label: str
    text: str
    decision: Decision
    written: str = ""

    @property
    def is_answerable(self) -> bool:
        """Whether the shipped documents hold the answer."""
        return self.decision != "write"


QUESTIONS = (
    Question(
        label="Q1",
        text="How many days do I have to return an opened item, and who pays for shipping?",
        decision="approve",
    ),
    Question(
        label="Q2",
        text="How often do I have to descale the machine?",
        decision="edit",
        written="Please descale the machine as the manual says; the passage is linked below.",
    ),
    Question(
        label="Q3",
        text="Which chess opening should I play against a much stronger opponent?",
        decision="write",
        written="We only sell and service our machines, so we cannot advise on this. Good luck!",
    ),
)


def find_clone() -> Path:
    """Return the clone's folder, which holds `examples`; raises NotFound when there is none."""
    for folder in (Path.cwd(), *Path(__file__).resolve().parents):
        if (folder / "examples" / "support_answer.py").is_file():
            return folder
    raise NotFound(
        "the demo's flow and documents are not here",
        advice="Run it in a clone of the repository: `make demo`.",
    )


def documents(clone: Path) -> list[Path]:
    """Return the shipped documents; raises NotFound when there are none."""
    folder = clone / "examples" / "documents"
    found = sorted(path for path in folder.glob("*") if path.is_file() and path.name[0] != ".")
    if not found:
        raise NotFound(f"{folder} holds no documents")
    return found
