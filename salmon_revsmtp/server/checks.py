"""What ``salmon-revsmtp check`` looks at on this machine: all that can fail before, or beside, the
network.  ``reaching`` has the rest.

Each thing that is looked at is one :class:`Finding`.  Nothing is changed, but that the tables of
accounts are made in a database that is new; what is missing and is made by itself when it is
needed, is no trouble.  The current folder is the project's.
"""

from __future__ import annotations

import contextlib
import importlib
import sqlite3
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import salmon_revsmtp
from salmon_revsmtp.delivery.consumer import QueueConsumer
from salmon_revsmtp.delivery.outbox import UNSENT
from salmon_revsmtp.delivery.router import DEFAULT_UNDELIVERABLE
from salmon_revsmtp.delivery.sample import sample_warning
from salmon_revsmtp.files import FEW_FILES, Room, room_in, try_folder
from salmon_revsmtp.foreign import printable
from salmon_revsmtp.hooks import HookFailedError
from salmon_revsmtp.hostname import machine_name
from salmon_revsmtp.journal.file import DEFAULT_JOURNAL, JournalFile
from salmon_revsmtp.net.certificate import (
    RENEWED_BY,
    certificate_ends,
    certificate_names,
    is_for,
)
from salmon_revsmtp.plugins.builtin import POSTGRES, postgres_accounts, psycopg_is_there
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.hold.places import without_secrets
from salmon_revsmtp.provider.settings import ProviderSettings
from salmon_revsmtp.server.attach import AttachedReceiver
from salmon_revsmtp.server.configuration import Configuration
from salmon_revsmtp.server.project import Project, ProjectError, explained

__all__ = [
    "FAILED",
    "OK",
    "SKIPPED",
    "WARNING",
    "Finding",
    "changed_since",
    "handler_modules",
    "local_findings",
]

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"

DAY = 86400.0

# Seconds that the journal's newest entry may be ahead of the clock.
AHEAD = 3600.0

# Seconds to wait for a process that writes to the journal.
JOURNAL_PATIENCE = 2.0

# Of a module in `handlers`.
MISSING = "see how it is spelled, and whether the file is in the project's folder"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    ``check``    what kind of thing, a word.
    ``subject``  which one: a file, an address, an agent.
    ``result``   ``ok``; ``warning``: it would work, but; ``failed``: it would not; ``skipped``.
    ``text``     a sentence for a person: what was found and, if it is trouble, what to try.
    """

    check: str
    subject: str
    result: str
    text: str

    def as_dict(self) -> dict[str, object]:
        """The finding as JSON has it; the keys are stable."""
        return asdict(self)


def local_findings(
    project: Project,
    configuration: Configuration,
    plugins: Plugins,
    boot: str | None,
    *,
    listen: bool,
    offline: bool,
) -> Iterator[Finding]:
    """All of this machine, one after the other; the boot module is imported on the way.

    ``plugins``  they may have accounts, too.
    ``boot``     its name; ``None`` is the default.
    ``listen``   the receiver of the boot module may listen.
    ``offline``  nothing asks DNS.
    """
    yield from _settings(project, configuration)
    booted = _boot(project, boot, listen)
    yield booted
    if booted.result != FAILED:
        yield from _handlers(project, configuration)
    else:
        text = "not tried, for the boot module, which loads them, failed"
        yield Finding("handlers", "all", SKIPPED, text)
    for folder in [Path("run"), Path("logs"), *_hold(configuration)]:
        yield _folder("folder", folder)
    yield from _database(configuration, offline)
    yield from _journal(DEFAULT_JOURNAL)
    yield from _queues(configuration)
    yield from _disks(configuration)
    yield _clock()
    yield from _certificates(configuration, offline)
    yield from _accounts(configuration)
    yield from _accounts_twice(configuration, plugins, offline)


# -- the settings and the project's code -----------------------------------------------------------


def _settings(project: Project, configuration: Configuration) -> Iterator[Finding]:
    name = project.settings.__name__
    listening = [one for one in configuration.services.values() if one.listen]
    counts = [
        _number(len(configuration.agents), "agent"),
        _number(len(listening), "service") + " listening" if listening else "",
        _number(len(configuration.accounts), "account") if configuration.accounts else "",
    ]
    if not (configuration.agents or listening or configuration.provider):
        yield Finding(
            "settings",
            name,
            WARNING,
            "no agent, no service that listens, no provider: there is "
            "nothing to do; fill in collection_agents, or smtp_services and provider",
        )
    else:
        yield Finding("settings", name, OK, ", ".join(filter(None, counts)))
    for warning in configuration.warnings:
        yield Finding("settings", name, WARNING, warning)
    secrets = project.folder / ".env"
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(secrets.stat().st_mode)
        if mode & 0o077:
            yield Finding(
                "settings",
                ".env",
                WARNING,
                f"others on this machine may read it (mode {mode:04o}),"
                " and it has passwords; chmod 600 .env",
            )


def changed_since(project: Project, started: float) -> Iterator[Finding]:
    """Files of the settings that are newer than the server that runs (seconds since the epoch)."""
    settings = getattr(project.settings, "__file__", None)
    files = [project.folder / ".env", *sorted((project.folder / "config").glob("*.py"))]
    if settings:
        files.insert(0, Path(settings).absolute())
    for path in dict.fromkeys(files):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime > started:
                name = (
                    path.relative_to(project.folder)
                    if path.is_relative_to(project.folder)
                    else path
                )
                text = (
                    "it has changed since the server started, which runs with the settings of "
                    "before: restart it"
                )
                yield Finding("settings", str(name), WARNING, text)


def handler_modules(project: Project) -> list[Any]:
    """The names of the modules of the project's handlers, as the settings list them; those that
    Salmon has loaded where they do not."""
    from salmon.routing import Router

    names = getattr(project.settings, "handlers", None)
    return list(names if isinstance(names, list | tuple) else Router.HANDLERS)


def _boot(project: Project, module: str | None, listen: bool) -> Finding:
    name = module or "config.boot"
    try:
        project.boot(module, listen)
    except ProjectError as error:
        return Finding("boot", name, FAILED, str(error).removeprefix(f"{name}: "))
    receiver = getattr(project.settings, "receiver", None)
    if not isinstance(receiver, AttachedReceiver | QueueConsumer):
        return Finding(
            "boot",
            name,
            WARNING,
            "nothing in it calls salmon_revsmtp.attach, so `salmon start` collects nothing; add: "
            "settings.receiver = salmon_revsmtp.attach(settings, settings.receiver)",
        )
    return Finding("boot", name, OK, "it can be imported")


def _handlers(project: Project, configuration: Configuration) -> Iterator[Finding]:
    """Salmon's Router logs what keeps a handler from being imported, and goes on without it."""
    from salmon.routing import Router

    names = handler_modules(project)
    missing = False
    for name in names:
        try:
            with explained(str(name), MISSING):
                importlib.import_module(str(name))
        except ProjectError as error:
            missing = True
            text = str(error).removeprefix(f"{name}: ")
            yield Finding(
                "handlers",
                str(name),
                FAILED,
                f"{text}; Salmon goes on without it, and mail for it is deferred or undeliverable",
            )
    if not configuration.routed:
        return
    if warning := sample_warning(configuration.routed):
        yield Finding("handlers", "sample", WARNING, warning)
    elif not Router.ORDER:
        yield Finding(
            "handlers",
            "routes",
            FAILED,
            "no handler has a route, so all mail becomes undeliverable; "
            'name handlers in the settings: handlers = ["salmon_revsmtp.handlers.maildir"]',
        )
    elif not missing:
        counted = f"{_number(len(names), 'module')}, {_number(len(Router.ORDER), 'route')}"
        yield Finding("handlers", ", ".join(map(str, names)), OK, counted)


# -- folders, the journal, the disk ----------------------------------------------------------------


def _folder(check: str, folder: Path) -> Finding:
    """Whether files can be made in a folder, or it itself."""
    try:
        return Finding(check, str(folder), OK, try_folder(folder))
    except OSError as error:
        return Finding(check, str(folder), FAILED, str(error))


def _journal(path: Path) -> Iterator[Finding]:
    """It can be written; and its times are none of the future, which a clock set back would do."""
    try:
        if not path.exists():
            yield Finding("journal", str(path), OK, "not there yet, it is made when it is needed")
            return
        with contextlib.closing(JournalFile(path).open(JOURNAL_PATIENCE)) as database:
            database.execute("BEGIN IMMEDIATE")
            [newest] = database.execute("SELECT max(ended) FROM collections").fetchone()
            database.execute("ROLLBACK")
    except (sqlite3.Error, OSError) as error:
        yield _journal_trouble(path, error)
        return
    yield Finding("journal", str(path), OK, "it can be written")
    if newest is not None and newest > time.time() + AHEAD:
        days = (newest - time.time()) / DAY
        yield Finding(
            "clock",
            "journal",
            WARNING,
            f"the last collection ended {days:,.1f} days in the future, as the clock says: is it "
            "right? TLS and logins depend on it",
        )


def _journal_trouble(path: Path, error: sqlite3.Error | OSError) -> Finding:
    reason = str(getattr(error, "strerror", None) or error)
    cost = "without it a message that is redelivered after a restart is handled twice"
    if "locked" in reason:
        text = f"{reason}: another process is writing to it for long"
        return Finding("journal", str(path), WARNING, text)
    if isinstance(error, sqlite3.DatabaseError) and ("not a" in reason or "malformed" in reason):
        cost += "; move it away, and a new one is made"
    return Finding("journal", str(path), FAILED, f"{reason}; {cost}")


def _queues(configuration: Configuration) -> Iterator[Finding]:
    """The Salmon Queues that mail may wait in."""
    services = configuration.services.values()
    for name in dict.fromkeys(one.queue for one in services if one.delivery == "queue"):
        yield _queue("queue", Path(name).expanduser(), OK, ", for the queue's consumer")
    yield _queue(
        "undeliverable",
        _undeliverable(),
        WARNING,
        " that no handler took; see `salmon-revsmtp undelivered`, and the log for the reason",
    )
    yield _queue("unsent", UNSENT, WARNING, " to senders, for the relay to take")


def _undeliverable() -> Path:
    from salmon.routing import Router

    from salmon_revsmtp.delivery.maildir import folder_of

    folder = folder_of(Router.UNDELIVERABLE_QUEUE) or DEFAULT_UNDELIVERABLE
    with contextlib.suppress(ValueError):
        return Path(folder).relative_to(Path.cwd())
    return Path(folder)


def _queue(check: str, folder: Path, if_not_empty: str, what: str) -> Finding:
    parts = [part for name in ("new", "cur", "tmp") if _is_folder(part := folder / name)]
    for place in [folder, *parts]:
        found = _folder(check, place)
        if found.result == FAILED:
            return Finding(check, str(folder), FAILED, found.text)
    try:
        waiting = sum(1 for part in parts if part.name != "tmp" for _ in part.iterdir())
    except OSError as error:
        return Finding(check, str(folder), FAILED, f"it cannot be read: {error.strerror}")
    if not waiting:
        return Finding(check, str(folder), OK, f"{found.text}; empty" if parts else found.text)
    return Finding(check, str(folder), if_not_empty, f"{_number(waiting, 'message')}{what}")


def _is_folder(path: Path) -> bool:
    with contextlib.suppress(OSError):  # those above it may be closed to us
        return path.is_dir()
    return False


def _disks(configuration: Configuration) -> Iterator[Finding]:
    """The room on each disk that mail comes to."""
    folders = [Path("run"), Path("logs"), *_hold(configuration)]
    seen: set[int] = set()
    for folder in folders:
        try:
            room = room_in(folder)
        except OSError as error:
            yield Finding("disk", str(folder), WARNING, f"its room is not known: {error.strerror}")
            continue
        if room.disk not in seen:
            seen.add(room.disk)
            yield _room(folder, room)


def _database(configuration: Configuration, offline: bool) -> Iterator[Finding]:
    """The hold store that is in no folder: only who uses it opens it.  But it is known what it
    takes to open that on PostgreSQL, and that its database has to answer."""
    settings = configuration.provider
    if settings is None or settings.hold_scheme is None:
        return
    shown = without_secrets(settings.hold)
    if settings.hold_scheme == POSTGRES and not (offline and psycopg_is_there()):
        try:
            accounts = postgres_accounts(configuration.module or ModuleType("settings"))
            if accounts is not None:
                accounts.find("")
        except OSError as error:
            yield Finding("hold", shown, FAILED, printable(str(error)))
        else:
            yield Finding("hold", shown, OK, "the database answers")
        return
    text = "not tried; the server opens it when it starts, and says if it cannot"
    yield Finding("hold", shown, SKIPPED, text)


def _hold(configuration: Configuration) -> Iterator[Path]:
    """The folder of the hold store, if there is one and it is in a folder."""
    folder = (configuration.provider or ProviderSettings()).hold_folder
    if configuration.holds and folder is not None:
        yield Path(folder)


def _room(folder: Path, room: Room) -> Finding:
    free = f"{room.octets / 1024**3:,.1f} GiB free"
    if room.files is not None and room.files < FEW_FILES:
        free += f", and room for {_number(room.files, 'file')}"
    if room.none:
        return Finding("disk", str(folder), FAILED, f"{free}: mail is answered 452; make room")
    if room.little:
        return Finding("disk", str(folder), WARNING, f"{free}; when it is full, mail has to wait")
    return Finding("disk", str(folder), OK, free)


# -- the clock, certificates, accounts -------------------------------------------------------------


def _clock() -> Finding:
    """Without the network: the clock is not before the day on which this program was installed."""
    now = datetime.now().astimezone().isoformat(" ", timespec="minutes")
    try:
        installed = Path(salmon_revsmtp.__file__ or "").stat().st_mtime
    except OSError:
        installed = 0.0
    if time.time() < installed - DAY:
        return Finding(
            "clock",
            "now",
            FAILED,
            f"{now}: that is before this program was installed, so the clock "
            "is wrong, and no certificate is valid yet; set it (chrony, systemd-timesyncd)",
        )
    return Finding("clock", "now", OK, now)


def _certificates(configuration: Configuration, offline: bool) -> Iterator[Finding]:
    """They are in the settings, so they can be read, and their keys fit."""
    places: list[tuple[str, Any]] = [
        (f'service "{name}"', one) for name, one in configuration.services.items() if one.listen
    ]
    if configuration.provider is not None:
        places.append(("provider", configuration.provider))
    for where, settings in places:
        if settings.tls_cert is None:
            if where == "provider" and not _only_here(configuration.provider):
                text = (
                    "it has none, so what customers collect is not encrypted; set tls_cert and "
                    "tls_key"
                )
                yield Finding("certificate", where, WARNING, text)
            continue
        try:
            yield from _certificate(where, settings, offline)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
            yield Finding("certificate", where, WARNING, f"its end cannot be seen: {reason}")


def _only_here(provider: ProviderSettings | None) -> bool:
    """It listens on the loopback only, maybe behind something that does TLS."""
    hosts = [address.host for address, _ in provider.addresses] if provider is not None else []
    return all(host == "localhost" or host == "::1" or host.startswith("127.") for host in hosts)


def _certificate(where: str, settings: Any, offline: bool) -> Iterator[Finding]:
    files = settings.tls_cert, settings.tls_key
    end = certificate_ends(*files)
    day, left = time.strftime("%Y-%m-%d", time.localtime(end)), (end - time.time()) / DAY
    subject = f"{where}, {settings.tls_cert}"
    if left <= 0:
        text = f"it ended on {day}, so no one can verify it; renew it"
        yield Finding("certificate", subject, FAILED, text)
    elif left * DAY < RENEWED_BY:
        text = f"it ends on {day}, in {left:.0f} days; renew it, or see why that did not happen"
        yield Finding("certificate", subject, WARNING, text)
    else:
        yield Finding("certificate", subject, OK, f"it ends on {day}")
    name = settings.hostname or (None if offline else machine_name())
    if name is None:
        return
    name = name.strip("[]").removeprefix("IPv6:")
    if not is_for(*files, name):
        names = ", ".join(certificate_names(*files)) or "no name"
        yield Finding(
            "certificate",
            subject,
            WARNING,
            f"it is for {names}, and hostname is {name}: who calls "
            "it by that name refuses it; get a certificate for it, or set hostname",
        )


def _accounts(configuration: Configuration) -> Iterator[Finding]:
    """Each account's domains are taken by a service that holds mail."""
    if not configuration.accounts and not configuration.elsewhere:
        return
    holding = {
        name: one
        for name, one in configuration.services.items()
        if one.delivery == "hold" and one.listen
    }
    if not holding:
        yield Finding(
            "accounts",
            "all",
            WARNING,
            "no service with delivery 'hold' listens, so no mail comes "
            "in from outside; add one to smtp_services with listen",
        )
        return
    accepted = {domain for one in holding.values() for domain in one.domains}
    every = "*" in accepted or not all(one.domains for one in holding.values())
    for account in configuration.accounts:
        left_out = [one for one in account.domains if not every and one not in accepted]
        if left_out:
            services = ", ".join(f'"{name}"' for name in holding)
            yield Finding(
                "accounts",
                account.name,
                WARNING,
                f"mail for {', '.join(left_out)} is refused: "
                f"domains of service {services} does not name it; leave domains out, and all "
                "accounts' are accepted",
            )
        else:
            text = ", ".join(account.domains) + (
                "" if account.enabled else "; its login is disabled"
            )
            yield Finding("accounts", account.name, OK, text)


def _accounts_twice(
    configuration: Configuration, plugins: Plugins, offline: bool
) -> Iterator[Finding]:
    """No account of the settings, and no domain of one, is one that a plugin has, too."""
    if not configuration.elsewhere:
        return
    names = ", ".join(sorted(configuration.elsewhere))
    if offline:
        yield Finding("accounts", names, SKIPPED, "not looked up: --offline")
        return
    module = configuration.module or ModuleType("settings")
    try:
        for account in configuration.accounts:
            if plugins.ask("find_account", name=account.name, settings=module) is not None:
                yield Finding(
                    "accounts",
                    account.name,
                    WARNING,
                    f"the name is in customer_accounts and elsewhere (plugin {names}), too; the "
                    "account in the settings counts, and the other one does not",
                )
            for domain in account.domains:
                other = plugins.ask("account_for", domain=domain, settings=module)
                if other is not None and (owner := str(other.get("name"))) != account.name:
                    yield Finding(
                        "accounts",
                        account.name,
                        WARNING,
                        f"{domain} is also that of account {owner!r} elsewhere (plugin {names}); "
                        "its mail goes to the account in the settings",
                    )
    except HookFailedError as error:
        text = f"they cannot be looked up: {error}"
        yield Finding("accounts", names, WARNING, text)


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
