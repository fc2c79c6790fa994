"""Tokens: what a work item needs of limits on tokens, as one of the keys that it has. Pure: no I/O, no clock.

Called by `rules`, `counting`, `limiting` and whoever makes runs. Invariants: the need of a lane is a part of what names
it, so that all items of a lane need the same; needs are rounded up, so that an org has few lanes of one flow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from millpond.errors import InvalidInput

NOUN = "tokens"
MOST_TOKENS = 10**9
# What work is told that needs more than there ever is.
ABOVE_LIMIT = "tokens_above_limit"
# What an item needs of which nobody said anything and nothing was learned yet.
FIRST_GUESS = 1000
_WEIGHT_OF_NEWEST = 0.1
# Averages of so many kinds of work are known at most: keys of steps may come from anybody's input.
_MOST_KNOWN = 10_000
_DIGITS = 2
_STAND = re.compile(r"tokens([:~])([0-9]{1,10}) ")
# Keys by which it is told where tokens were used.
_OF_MODELS = ("provider:", "model:")


class Need(NamedTuple):
    """How many tokens each item of a lane reserves; not `is_declared`: by what was learned."""

    tokens: int
    is_declared: bool


class Used(NamedTuple):
    """What a run used of what these of its keys name; `is_lost`: a call was cut off, so that nobody knows all of it.

    `provider:` and `model:` alone among the keys are another one than its own, which a step of it has as its own key.
    """

    keys: tuple[str, ...]
    tokens: int
    is_lost: bool = False


def rounded(tokens: float) -> int:
    """Return a need with two significant digits, rounded up: 2,345 are 2,400."""
    whole = -int(-tokens // 1)
    unit = int(10 ** max(0, len(str(whole)) - _DIGITS))
    return -(-whole // unit) * unit


def check_tokens(tokens: int) -> int:
    """Return what a run declares to need, rounded; raises InvalidInput."""
    if not 1 <= tokens <= MOST_TOKENS:
        raise InvalidInput(f"tokens are a whole number from 1 to {MOST_TOKENS:,}", param="tokens")
    return rounded(tokens)


def key_of(tokens: int) -> str:
    """Return the key by which a lane tells its need."""
    return f"{NOUN}:{tokens}"


def is_need(key: str) -> bool:
    """Whether a key tells a need, and names nothing that is limited."""
    return key.startswith(f"{NOUN}:")


def need_of(keys: Iterable[str]) -> int | None:
    """Return the need that keys declare, the last where there are several; None without any."""
    found = None
    for key in keys:
        number = key.removeprefix(f"{NOUN}:")
        if number is not key and number.isascii() and number.isdecimal() and len(number) <= 10:
            found = int(number)
    return found


def without_need(keys: Iterable[str]) -> list[str]:
    """Return keys as people gave them."""
    return [key for key in keys if not is_need(key)]


def parts_of(key: str) -> list[str]:
    """Return the provider and the model that a limit's key, or a pair, names."""
    return [part for part in key.split("×") if part.startswith(_OF_MODELS)]


def carried(keys: Iterable[str]) -> list[str]:
    """Return the providers and models that work counts on."""
    return [key for key in keys if key.startswith(_OF_MODELS)]


def tried_by(capability: str, keys: Iterable[str]) -> str:
    """Name the tries of steps with these keys in a flow, by which it is learned what one of them uses."""
    return " ".join([capability, *without_need(keys)])


def above_limit(what: str, need: int, key: str, at_once: int) -> InvalidInput:
    """Return the refusal of work that needs more tokens than a limit on a key ever has at once."""
    return InvalidInput(
        f"{what} needs {need:,} tokens, and {key} never has more than {at_once:,} at once",
        code=ABOVE_LIMIT,
        param="tokens",
        advice="let it need fewer tokens, or have the limit raised",
        details={"key": key, "tokens": need, "at_once": at_once},
    )


def used_keys(model: str) -> list[str]:
    """Return the keys that a model's name stands for: `openai:gpt-mini`, or a name alone."""
    provider, _, name = model.partition(":")
    return [f"provider:{provider}", f"model:{name or provider}", f"model:{model}"]


def counts_under(key: str, carried: Sequence[str], used: Sequence[str]) -> bool:
    """Whether what was used of some keys counts under a limit on `key`, as `claim_tokens` of the migrations has it.

    Not where the limit is on one provider or model, and it was another one that the work has among its keys, or its
    step among its own: of that `provider:` or `model:` alone is told.
    """
    others = {one.partition(":")[0] for one in carried if one in used}
    others |= {one[:-1] for one in used if one.endswith(":")}
    return all(part in used or part.partition(":")[0] not in others for part in parts_of(key))


def stand(room: str, need: Need) -> str:
    """Name where lanes with a need stand that wait for a limit on tokens; `room` is its name."""
    mark = ":" if need.is_declared else "~"
    return f"{NOUN}{mark}{need.tokens} {room.partition(' ')[2]}"


def need_at(name: str) -> Need | None:
    """Return what lanes need that stand under a name; None where it is no limit on tokens."""
    found = _STAND.match(name)
    return None if found is None else Need(int(found[2]), found[1] == ":")


class Needs:
    """Moving averages of tokens used, by capability: what an item needs that declares nothing."""

    __slots__ = ("_averages",)

    def __init__(self) -> None:
        self._averages: dict[str, float] = {}

    def learn(self, capability: str, used: int) -> None:
        """Learn from what was used under one lease, or by one try."""
        before = self._averages.pop(capability, float(used))  # so that it stands last
        self._averages[capability] = before + _WEIGHT_OF_NEWEST * (used - before)
        if len(self._averages) > _MOST_KNOWN:
            del self._averages[next(iter(self._averages))]

    def need(self, capability: str, keys: Sequence[str]) -> Need:
        """Return what an item of a lane needs."""
        declared = need_of(keys)
        if declared is not None:
            return Need(max(1, declared), is_declared=True)
        learned = rounded(self._averages.get(capability, FIRST_GUESS))
        return Need(max(1, learned), is_declared=False)
