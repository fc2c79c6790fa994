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
        text="How many days do I have to return a tent?",
        decision="approve",
    ),
    Question(
        label="Q2",
        text="How often do I have to replace the hose and the regulator of the Ember 2?",
        decision="edit",
        written="Please replace the hose and the regulator (part EM-RG1) every 5 years, or at once if "
        "the hose is cracked, stiff or scorched.",
    ),
    Question(
        label="Q3",
        text="Which chess opening should I play against a much stronger opponent?",
        decision="write",
        written="We know stoves and tents better than chess, so we cannot advise on this. Good luck!",
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


def read_text(path: Path) -> str:
    """Return the words of a shipped document, read apart from how the platform reads it."""
    if path.suffix != ".pdf":
        return path.read_text(encoding="utf-8")
    import pypdfium2

    with pypdfium2.PdfDocument(path) as pdf:
        return "\n".join(page.get_textpage().get_text_bounded() for page in pdf)
