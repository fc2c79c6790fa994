"""The texts of mails to people; pure.

Called by the rooms that write them. Invariant: a mail says what happened, what to do, and what to do if it was not you.
"""

from __future__ import annotations

from millpond.identity.mailing import Mail

_NOT_YOU = "If this was not you, there is nothing to do: nothing changes without the link."


def confirm(to: str, link: str, ttl_s: float) -> Mail:
    """Return the mail that confirms an address for a new account."""
    text = (
        f"Somebody asked for a Millpond account with this address.\n\n"
        f"Finish by choosing a password here; the link works once, for {_minutes(ttl_s)} minutes:\n\n"
        f"{link}\n\n{_NOT_YOU}\n"
    )
    return Mail(to=to, subject="Confirm your Millpond account", text=text)


def known(to: str) -> Mail:
    """Return the mail to somebody who has an account already."""
    text = (
        "Somebody asked for a Millpond account with this address, which has one already.\n\n"
        "Sign in with it, or reset its password if you do not know it.\n\n"
        "If this was not you, there is nothing to do.\n"
    )
    return Mail(to=to, subject="You have a Millpond account", text=text)


def reset(to: str, link: str, ttl_s: float) -> Mail:
    """Return the mail with the link that sets a new password."""
    text = (
        f"Somebody asked to reset the password of your Millpond account.\n\n"
        f"Choose a new one here; the link works once, for {_minutes(ttl_s)} minutes:\n\n"
        f"{link}\n\n{_NOT_YOU}\n"
    )
    return Mail(to=to, subject="Reset your Millpond password", text=text)


def changed(to: str) -> Mail:
    """Return the mail that says that a password was changed."""
    text = (
        "The password of your Millpond account was changed, and its other sessions were ended.\n\n"
        "If this was not you, reset the password now and tell your administrator.\n"
    )
    return Mail(to=to, subject="Your Millpond password was changed", text=text)


def _minutes(ttl_s: float) -> int:
    return max(1, round(ttl_s / 60))
