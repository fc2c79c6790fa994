"""Reads what an operator says of a worker's slots: how many, whom idle ones help, which are kept and reserved. Pure.

Called by `config` for the settings of workers, and by `limit_replay` for a replay with others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from millpond.engine.spilling import Spill
from millpond.errors import InvalidInput


@dataclass(frozen=True, kw_only=True, slots=True)
class SpillTexts:
    """What was written, and as what each part is named in errors."""

    spill: str = ""
    keep: str = ""
    reserve: str = ""
    names: tuple[str, str, str] = ("--spill", "--spill-keep", "--reserve")

    def __bool__(self) -> bool:
        """Whether anything was written."""
        return bool(self.spill or self.keep or self.reserve)


def read_spill(texts: SpillTexts, slots: Mapping[str, int]) -> Spill:
    """Read whom idle slots help, and what is kept and reserved; raises InvalidInput for what cannot be."""
    of_spill, of_keep, of_reserve = texts.names
    helps: dict[str, list[str]] = {}
    for word in words(texts.spill):
        name, _, text = word.partition(":")
        helped = text.split("+")
        if not name or not all(helped) or name in helped or len(helped) > len(set(helped)):
            raise InvalidInput(
                f"{word!r} is not `queue:helped+helped` with each of them once", param=of_spill
            )
        if name in helps:
            raise InvalidInput(f"queue {name} is named twice", param=of_spill)
        helps[name] = helped
    keep = read_counts(texts.keep, param=of_keep)
    reserve = read_counts(texts.reserve, param=of_reserve)
    _check_slots(helps, slots, param=of_spill)
    _check_slots(keep, slots, param=of_keep, most=keep)
    _check_slots(reserve, slots, param=of_reserve, most=reserve)
    return Spill(helps=helps, keep=keep, reserve=reserve)


def words(text: str) -> list[str]:
    """Return what stands between commas, empty parts left out."""
    return [word.strip() for word in text.split(",") if word.strip()]


def read_counts(text: str, *, param: str) -> dict[str, int]:
    """Read `name:slots,…`; raises InvalidInput naming `param` for an entry that is not that."""
    slots: dict[str, int] = {}
    for word in words(text):
        name, _, count = word.partition(":")
        if not name or not count.isdecimal() or int(count) < 1:
            raise InvalidInput(f"{word!r} is not `queue:slots` with at least one slot", param=param)
        slots[name] = int(count)
    return slots


def _check_slots(
    named: Iterable[str],
    slots: Mapping[str, int],
    *,
    param: str,
    most: Mapping[str, int] | None = None,
) -> None:
    """Refuse queues without slots of their own, and more than all but one of the slots that a queue has."""
    for queue in named:
        if queue not in slots:
            raise InvalidInput(
                f"queue {queue} has no slots of its own (MILLPOND_QUEUES)", param=param
            )
        if most is not None and most[queue] >= slots[queue]:
            raise InvalidInput(
                f"queue {queue} has {slots[queue]} slots, and {most[queue]} of them leave none",
                param=param,
            )
