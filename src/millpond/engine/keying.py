"""Keying: how keys of runs and of limits are written, and which a work item has. Pure: no I/O, no clock.

Called by `rules` and whoever takes keys from people or code. Invariant: what is refused is named, with what was
expected and what to do; keys that a lane has already are read whatever they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from millpond.engine.tokens import check_tokens, is_need, key_of, need_of, without_need
from millpond.errors import InvalidInput

PAIR = "×"
MAX_KEYS = 16
# Every work item has these without declaring them: its org, its queue, and a run's flow.
IMPLIED = frozenset({"org", "queue", "flow"})
_PART = re.compile(r"[a-z][a-z0-9_]{0,29}:(?:\*|[^\s*×\x00-\x1f\x7f]{1,200})")
_PAIRING = re.compile(r"\s*×\s*|\s+x\s+")


def parse_key(text: str, *, is_old: bool = False) -> str:
    """Return a limit's key in its one way of writing; raises InvalidInput.

    The two parts of a pair are written with `×` or with an `x` between spaces; an org goes first. One that `is_old` is
    to be taken away, and may be what an earlier release let be set.
    """
    parts = [part.strip() for part in _PAIRING.split(text.strip())]
    if not 1 <= len(parts) <= 2 or not all(_PART.fullmatch(part) for part in parts):
        raise InvalidInput(
            f"{text[:200]!r} is no key of a limit",
            code="limit_key_malformed",
            param="key",
            advice="write noun:name, noun:*, or two of these with × between them",
        )
    parts.sort(key=lambda part: (not part.startswith("org:"), part))
    if is_old:
        return PAIR.join(parts)
    for part in parts:
        if is_need(part):
            raise InvalidInput(
                f"{part} is no key of a limit: tokens are a kind of limit, on a key such as provider:openai",
                code="limit_key_malformed",
                param="key",
                advice="name the provider or model as the key, and tokens as the kind",
            )
    if len(parts) == 2 and noun_of(parts[0]) == noun_of(parts[1]):
        raise InvalidInput(
            f"{PAIR.join(parts)} is no key of a limit: the two parts of a pair have different nouns",
            code="limit_key_malformed",
            param="key",
            advice="set a limit on each of the two, or pair one with a key of another noun",
        )
    return PAIR.join(parts)


def check_keys(
    keys: Sequence[str], *, declared: Sequence[str] = (), tokens: int | None = None
) -> tuple[str, ...]:
    """Return the keys of a run, sorted and each once; a pair stands for its two. Raises InvalidInput.

    `declared` are the keys of its flow, of which one may tell how many tokens its runs need; `tokens` is what it needs
    itself, and told by a key too.
    """
    for part in (part for key in keys for part in _parts_of_run(key)):
        if is_need(part):
            raise InvalidInput(
                f"{part[:200]} is no key: how many tokens a run needs is not told by its keys",
                code="key_malformed",
                param="keys",
                advice="leave it out of the keys, and give the number as `tokens`",
            )
    parts = [part for key in (*without_need(declared), *keys) for part in _parts_of_run(key)]
    if len(set(parts)) > MAX_KEYS:
        raise InvalidInput(
            f"{len(set(parts))} keys are too many: there are at most {MAX_KEYS}, those of the flow included",
            param="keys",
            advice=f"give {MAX_KEYS} at most, of those alone that something is limited by",
        )
    for part in parts:
        if noun_of(part) in IMPLIED:
            raise InvalidInput(
                f"{part[:200]} is not to be given: every run has the keys of its org, queue and flow by itself",
                param="keys",
                advice=f"leave it out; a limit on {noun_of(part)}:… counts the run as it is",
            )
    need = need_of(declared) if tokens is None else check_tokens(tokens)
    return tuple(sorted({*parts, *(() if need is None else (key_of(need),))}))


def _parts_of_run(key: str) -> list[str]:
    """Return the one or two keys that a run's key names; raises InvalidInput for what is none."""
    parts = [part.strip() for part in key.split(PAIR)] if PAIR in key else [key]
    if all(_PART.fullmatch(part) and "*" not in part for part in parts) and len(parts) <= 2:
        return parts
    advice = "write noun:name, such as provider:openai"
    if PAIR in key:
        advice = f"{PAIR} stands between the two keys of a pair and in no name: {advice}"
    raise InvalidInput(
        f"{key[:200]!r} is no key: {advice}", code="key_malformed", param="keys", advice=advice
    )


def is_key(text: object) -> bool:
    """Whether a text is one key of a run, such as `provider:openai`."""
    return isinstance(text, str) and "*" not in text and bool(_PART.fullmatch(text))


def noun_of(part: str) -> str:
    """Return what stands before the colon."""
    return part.split(":", 1)[0]


def keys_of(queue: str, capability: str, keys: Sequence[str]) -> tuple[str, ...]:
    """Return all keys of a lane but that of its org; `capability` is `flow@version` or `step:name`.

    Keys may be older than what is asked of them now: one that is a pair counts as each of its parts.
    """
    implied = [f"queue:{queue}"]
    if not capability.startswith("step:"):
        implied.append(f"flow:{capability.rsplit('@', 1)[0]}")
    parts = [part for key in keys for part in key.split(PAIR) if part and not is_need(part)]
    return tuple(dict.fromkeys([*implied, *parts]))
