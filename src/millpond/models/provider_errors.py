"""Errors of model providers become Millpond's: the only file that knows pydantic-ai's error classes.

Called around every request to a provider. Invariant: no answer's body passes, since providers echo
prompts in it; status, the provider's own error code and the model's name do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from pydantic_ai import exceptions as theirs

from millpond.errors import InvalidInput, MillpondError, Permanent, Transient

_AGAIN_STATUS = frozenset({408, 409, 425, 429})
# A code is words or a short number; what else stands in its place may be an echo of the request, its key included.
_CODE = re.compile(r"[A-Za-z]{1,30}(_[A-Za-z]{1,30}){0,5}|\d{1,6}")
_OF_PROVIDER = frozenset(
    {"model_timeout", "model_unreachable", "model_rate_limited", "model_unavailable"}
)
_REJECTED = (theirs.ModelRequestRejectedError, theirs.ModelQuotaExceededError)


def translate(error: Exception, model: str) -> MillpondError | None:
    """Return Millpond's error for one raised while asking `model`, or None when it is not known.

    Where the provider is asked too much or cannot be had, it names the keys of limits that this is about; an answer
    that came and cannot be read says nothing of the kind.
    """
    if isinstance(error, MillpondError):
        return None
    ours = _translate(error, model)
    is_read = isinstance(error, ValueError)
    if isinstance(ours, Transient) and ours.code in _OF_PROVIDER and not is_read:
        provider, _, name = model.partition(":")
        ours.limit_keys = (f"provider:{provider}", f"model:{name or provider}")
    return ours


def _translate(error: Exception, model: str) -> MillpondError | None:
    if isinstance(error, theirs.ModelHTTPError):
        return _by_status(error, model)
    if isinstance(error, theirs.ModelTimeoutError | theirs.ModelRequestTimeout | TimeoutError):
        return Transient(f"{model} did not answer in time.", code="model_timeout")
    if isinstance(error, _REJECTED):
        return Permanent(f"{model} refused the request.", code="model_refused")
    if isinstance(error, theirs.ModelAPIError):
        return Transient(
            f"{model} could not be reached or broke off.",
            code="model_unreachable",
            retry_after_s=error.retry_after,
        )
    if isinstance(error, theirs.UnexpectedModelBehavior):
        return Transient(f"{model} gave an answer that cannot be read.", code="model_unreadable")
    if isinstance(error, httpx2.HTTPError | OSError | ValueError):
        return Transient(
            f"{model} broke off its answer ({type(error).__name__}).", code="model_unreachable"
        )
    return None


def _by_status(error: theirs.ModelHTTPError, model: str) -> MillpondError:
    status = error.status_code
    said = f"{model} answered {status}"
    if error.provider_error_code and _CODE.fullmatch(error.provider_error_code):
        said += f" ({error.provider_error_code})"
    details = {"status": status}
    if isinstance(error, theirs.ModelQuotaExceededError):
        return Permanent(
            f"{said}: the account's quota or credit is used up.",
            code="model_quota",
            advice="Raise the quota at the provider.",
            details=details,
        )
    if status == 429:
        return Transient(
            f"{said}: too many requests.",
            code="model_rate_limited",
            retry_after_s=error.retry_after,
            details=details,
        )
    if status >= 500 or status in _AGAIN_STATUS:
        return Transient(
            f"{said}.", code="model_unavailable", retry_after_s=error.retry_after, details=details
        )
    if isinstance(error, theirs.ModelContextWindowExceededError):
        return InvalidInput(
            f"{said}: the prompt is longer than the model reads.",
            code="context_too_long",
            details=details,
        )
    if status in (401, 403):
        return Permanent(
            f"{said}: the key is missing, wrong or not allowed to use this model.",
            code="model_key_refused",
            advice="Check MILLPOND_LLM_API_KEY.",
            details=details,
        )
    if status == 404:
        return Permanent(
            f"{said}: no such model or address.",
            code="model_not_found",
            advice="Check MILLPOND_LLM and MILLPOND_LLM_BASE_URL.",
            details=details,
        )
    return Permanent(f"{said}: the request was refused.", code="model_refused", details=details)


@contextmanager
def translated(model: str) -> Iterator[None]:
    """Raise Millpond's error in place of the provider's."""
    try:
        yield
    except Exception as error:
        ours = translate(error, model)
        if ours is None:
            raise
        raise ours from error
