"""The veil: hides values of secrets in whatever leaves a run, in the forms in which they are met.

One Veil per attempt: `engine` adds what a run opens and draws it over results, errors and events; the logs draw the one
of the current task. Invariants: a veil without secrets costs a look at a number; what was drawn over holds no value of
`MIN_LENGTH` characters or more, neither as it is nor JSON- or URL-escaped nor in base64 at any place.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any
from urllib.parse import quote, quote_plus
from weakref import WeakSet

import orjson

# Shorter values would hide common words.
MIN_LENGTH = 8
_MAX_MEMBERS = 200


class Veil:
    """The secrets that one run has opened so far; a thread may draw it while one is added."""

    __slots__ = ("__weakref__", "_hidden", "_in_texts", "_known")

    def __init__(self) -> None:
        # Each form to hide with what stands in its place, the longest first; and how they may stand in JSON text.
        self._hidden: Sequence[tuple[str, str]] = ()
        self._in_texts: Sequence[str] = ()
        self._known: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        """Whether there is anything to hide."""
        return bool(self._hidden)

    def __repr__(self) -> str:
        """Return nothing of what is hidden."""
        return f"Veil({len({instead for _, instead in self._hidden})} secrets)"

    def add(self, name: str, value: str) -> None:
        """Hide a value from now on, and tell its name instead; one that is too short stays as it is.

        Hidden too are the value without blanks around it, and texts in one that is a JSON object.
        """
        if len(value) < MIN_LENGTH or value in self._known:
            return
        hidden = dict(self._hidden)
        for part in dict.fromkeys((value, value.strip(), *_members(value))):
            for form in forms(part) if len(part) >= MIN_LENGTH else ():
                hidden.setdefault(form, f"[secret:{name}]")
        self._known |= {value}
        in_texts = {*hidden, *map(_escaped, hidden)}
        self._in_texts = sorted(in_texts, key=len, reverse=True)
        self._hidden = sorted(hidden.items(), key=lambda one: len(one[0]), reverse=True)
        with _lock:
            _live.add(self)

    def text(self, text: str) -> str:
        """Hide the values in plain text."""
        for form, instead in self._hidden:
            text = text.replace(form, instead)
        return text

    def broken(self, text: str) -> str:
        """Hide the values in a text that was cut, also one of which only the beginning is left."""
        cut = self.broken_off(text)
        tail = text[cut:]
        if len(tail) < MIN_LENGTH:
            return self.text(text)
        return self.text(text[:cut]) + next(
            instead for form, instead in self._hidden if form.startswith(tail)
        )

    def json(self, text: str) -> str:
        """Hide the values in JSON text, also in names of members; a number that shows one becomes a string."""
        if not any(form in text for form in self._in_texts):
            return text
        found = json.loads(text, parse_float=_Number, parse_int=_Number)
        return orjson.dumps(self.value(found)).decode()

    def value(self, value: Any) -> Any:
        """Return JSON-like data with the values hidden, made anew."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.value(key): self.value(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(one) for one in value]
        if isinstance(value, _Number):
            hidden = self.text(value.text)
            return orjson.Fragment(value.text) if hidden == value.text else hidden
        if isinstance(value, int | float) and not isinstance(value, bool):
            shown = repr(value)
            return value if (hidden := self.text(shown)) == shown else hidden
        return value

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where forms stand in plain text, each by its begin and end."""
        for form, _ in self._hidden:
            at = text.find(form)
            while at >= 0:
                yield at, at + len(form)
                at = text.find(form, at + 1)

    def broken_off(self, text: str) -> int:
        """Return where the longest beginning of a form stands at the end of a text; its length where there is none."""
        return min((_broken_off(text, form) for form, _ in self._hidden), default=len(text))


class Stream:
    """Hides values in text that comes in pieces: what may be the beginning of one is kept until more is known."""

    def __init__(self, veil: Veil) -> None:
        self._veil = veil
        self._kept = ""

    def feed(self, piece: str) -> str:
        """Return what may be shown by now."""
        text, veil = self._kept + piece, self._veil
        if not veil:
            return text
        cut = veil.broken_off(text)
        spans = sorted(veil.spans(text), reverse=True)
        for begin, end in spans:  # a value that the cut would part stays whole
            if begin < cut < end:
                cut = begin
        self._kept = text[cut:]
        return veil.text(text[:cut])

    def end(self) -> str:
        """Return the rest; what would be enough of a value to hide is hidden also where it breaks off."""
        rest, self._kept = self._kept, ""
        return self._veil.broken(rest)


class _Number:
    """A number of a JSON text, letter by letter."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


_live: WeakSet[Veil] = WeakSet()
_lock = threading.Lock()
_current: ContextVar[Veil | None] = ContextVar("millpond_veil", default=None)


def current() -> Veil | None:
    """Return the veil of the run that the current task works for; None outside of runs."""
    return _current.get()


def drawn() -> Veil | None:
    """Return the veil of the current task's run where it hides something."""
    veil = _current.get()
    return veil if veil is not None and veil._hidden else None


def live() -> list[Veil]:
    """Return the veils of all runs that this process works for, for what belongs to none that is known.

    Those that hide nothing are left out.
    """
    with _lock:
        return list(_live)


def begin() -> Veil:
    """Let the current task, and those that it begins, work under a new veil."""
    veil = Veil()
    _current.set(veil)
    return veil


def forms(value: str) -> list[str]:
    """Return the forms in which a value is hidden, the value itself first."""
    raw = value.encode("utf-8", "surrogatepass")
    ascii_only = json.dumps(value)[1:-1]
    found = [value, _escaped(value), ascii_only, ascii_only.replace("/", "\\/")]
    for escape in (quote, quote_plus):
        for safe in ("", "/"):
            escaped = escape(raw, safe=safe)
            found += [escaped, _ESCAPE.sub(lambda one: one[0].lower(), escaped)]
    for shift in range(3):
        # Letters that no neighbour has a part in: a first and a last one may be made of others' bits too.
        first, end = -(-8 * shift // 6), 8 * (shift + len(raw)) // 6
        coded = base64.b64encode(bytes(shift) + raw)[first:end].decode()
        found += [coded, coded.translate(_URL_ALPHABET)]
    return list(dict.fromkeys(found))


_ESCAPE = re.compile("%..")
_URL_ALPHABET = str.maketrans("+/", "-_")
_PROBE = 8


def _members(value: str) -> list[str]:
    """Return the texts in a value that is a JSON object, as keys of service accounts are; the first hundred."""
    if not value.lstrip().startswith("{"):
        return []
    try:
        left, found = [json.loads(value)], list[str]()
    except (ValueError, RecursionError):
        return []
    while left and len(found) < _MAX_MEMBERS:
        one = left.pop()
        if isinstance(one, str) and len(one) >= MIN_LENGTH:
            found += [one, one.strip()]
        elif isinstance(one, dict | list):
            left += reversed(one.values() if isinstance(one, dict) else one)
    return found


def _escaped(text: str) -> str:
    """Return how a text stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _broken_off(text: str, form: str) -> int:
    """Return where the longest true beginning of `form` stands at the end of `text`, else the text's length."""
    begin = max(0, len(text) - len(form) + 1)
    at = text.find(form[:_PROBE], begin)
    while at >= 0:
        if form.startswith(text[at:]):
            return at
        at = text.find(form[:_PROBE], at + 1)
    for at in range(max(begin, len(text) - _PROBE + 1), len(text)):
        if form.startswith(text[at:]):
            return at
    return len(text)
