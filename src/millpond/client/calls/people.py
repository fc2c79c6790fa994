"""Calls about people: signing in, accounts, and whoever calls."""

from __future__ import annotations

from millpond.client.call import Call, Id, get, path_of, post, read_nothing, reader
from millpond.client.models import Page
from millpond.client.models_people import CreatedUser, Mailed, Me, MySession, SignedIn


def sign_in(email: str, password: str) -> Call[SignedIn]:
    """Open a session by email and password."""
    return post(path_of("auth", "sign-in"), SignedIn, {"email": email, "password": password})


def refresh_session(refresh_token: str) -> Call[SignedIn]:
    """Trade a refresh token for the next one; a client with a `refresh_token` does it by itself."""
    return post(path_of("auth", "refresh"), SignedIn, {"refresh_token": refresh_token})


def sign_out(refresh_token: str) -> Call[None]:
    """End the session of a refresh token."""
    body = {"refresh_token": refresh_token}
    path = path_of("auth", "sign-out")
    return Call(method="POST", path=path, read=read_nothing, body=body, is_same_twice=True)


def register_account(email: str, name: str = "") -> Call[Mailed]:
    """Ask for an account; a mailed link makes it."""
    return post(path_of("auth", "register"), Mailed, {"email": email, "name": name})


def confirm_registration(token: str, password: str) -> Call[CreatedUser]:
    """Make the account of a mailed link."""
    body = {"token": token, "password": password}
    return post(path_of("auth", "register", "confirm"), CreatedUser, body)


def request_password_reset(email: str) -> Call[Mailed]:
    """Ask for a mailed link that sets a new password."""
    return post(path_of("auth", "password-reset"), Mailed, {"email": email})


def confirm_password_reset(token: str, password: str) -> Call[None]:
    """Set a new password by a mailed link; all sessions end."""
    body = {"token": token, "password": password}
    path = path_of("auth", "password-reset", "confirm")
    return Call(method="POST", path=path, read=read_nothing, body=body)


def claim_operator(token: str, email: str, password: str, name: str = "") -> Call[CreatedUser]:
    """Make the operator's account by the link that `millpond operator` printed."""
    body = {"token": token, "email": email, "name": name, "password": password}
    return post(path_of("auth", "operator"), CreatedUser, body)


def get_me() -> Call[Me]:
    """Return who calls, and what they may."""
    return get(path_of("me"), Me)


def change_me(name: str) -> Call[Me]:
    """Change one's own name."""
    return Call(method="PATCH", path=path_of("me"), read=reader(Me), body={"name": name})


def list_my_sessions() -> Call[Page[MySession]]:
    """One's own live sessions, newest first."""
    return get(path_of("me", "sessions"), Page[MySession])


def revoke_my_session(session_id: Id) -> Call[None]:
    """End one of one's own sessions."""
    path = path_of("me", "sessions", session_id)
    return Call(method="DELETE", path=path, read=read_nothing)


def change_my_password(old_password: str, new_password: str) -> Call[SignedIn]:
    """Change one's own password; the other sessions end, this one gets the tokens that are returned."""
    body = {"old_password": old_password, "new_password": new_password}
    return post(path_of("me", "password"), SignedIn, body)
