"""Tells someone once when a trouble has lasted, and once when it is over.

What has been told is kept in ``run/alert.json``, so that a server that is started again tells
nothing twice.  Who cannot be told now is told later: a failure costs a line in the log and some
time, which doubles with each.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salmon_revsmtp import Server
    from salmon_revsmtp.alert.settings import AlertSettings

__all__ = ["Alarm", "command_environment", "run_command"]

MEMORY = Path("run/alert.json")

# Seconds between two looks; more often where ``after`` is less.
LOOK_EVERY = 60.0
# Seconds that a command may take.
COMMAND_TIMEOUT = 60.0
# Seconds until who could not be told is tried again: this, doubled at each further failure, and no
# more than that.
RETRY = 120.0
LONGEST_RETRY = 6 * 3600.0
# Octets of what a command says that the log has when it fails.
MOST_SAID = 500
# Troubles in one text; of more the number is told.
MOST_TOLD = 20

BEGUN, OVER = "begun", "over"

log = logging.getLogger(__name__)

#: Runs a command with a text on its standard input and variables in its environment.
Run = Callable[[Sequence[str], str, Mapping[str, str], Path], None]


class Alarm:
    """Looks at what needs a person, and tells of it.

    ``clock``   gives seconds since the epoch, for a person.
    ``run``     as :func:`run_command`.
    ``steady``  gives seconds on a clock that no one sets: by that it is counted how long a trouble
                lasts.
    """

    def __init__(
        self,
        server: Server,
        settings: AlertSettings,
        clock: Callable[[], float] = time.time,
        run: Run | None = None,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server, self._settings, self._clock = server, settings, clock
        self._steady = steady
        # When each trouble began, on that clock.
        self._began: dict[str, float] = {}
        self._run = run or run_command
        self._file = server.project / MEMORY
        self._known = self._recall()
        # When each way is tried again, on the steady clock, and how often it has failed.
        self._again: dict[str, tuple[float, int]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._live, name="alert", daemon=True)

    def start(self) -> None:
        """Look from now on, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; waits for what is being told."""
        self._stopped.set()
        self._thread.join()

    def _live(self) -> None:
        failed = False  # one line tells of all that follow
        while True:
            try:
                self.look()
                failed = False
            except RuntimeError as error:
                log.info("alert: %s", error)  # the server has stopped, or is busy
            except Exception:
                log.log(logging.DEBUG if failed else logging.ERROR, "alert: looking", exc_info=True)
                failed = True
            if self._stopped.wait(min(LOOK_EVERY, self._settings.seconds)):
                return

    def look(self) -> None:
        """Look once, and tell what is to be told.  Raises :class:`RuntimeError` when the server has
        stopped."""
        now, steady = self._clock(), self._steady()
        there = {one.key: one for one in self._server.troubles()}
        for key, one in there.items():
            since = now if one.since is None else one.since
            known = self._known.setdefault(key, {"since": since, "told": []})
            # Nothing has begun after now: the clock was wrong then, or is it now.
            known["text"], known["since"] = one.text, min(since, known["since"], now)
            self._began.setdefault(key, steady - (now - known["since"]))
        for key in self._began.keys() - there:
            del self._began[key]
        ways = [name for name in ("command", "mail") if getattr(self._settings, name)]
        for way in ways:
            lasting = [
                key
                for key in there
                if way not in self._known[key]["told"]
                and steady - self._began[key] >= self._settings.seconds
            ]
            gone = self._known.keys() - there
            ended = [key for key in gone if way in self._known[key]["told"]]
            for state, keys in ((BEGUN, lasting), (OVER, sorted(ended))):
                if keys and self._may_try(way, steady):
                    self._tell(way, state, keys)
        # What is over, and no one is to hear of any more.
        for key in self._known.keys() - there:
            if not set(self._known[key]["told"]) & set(ways):
                del self._known[key]
        self._keep()

    # -- telling --------------------------------------------------------------------------------

    def _may_try(self, way: str, steady: float) -> bool:
        return way not in self._again or steady >= self._again[way][0]

    def _tell(self, way: str, state: str, keys: Sequence[str]) -> None:
        try:
            if way == "command":
                self._command(state, keys)
            else:
                self._mail(state, keys)
        except Exception as error:
            _, failures = self._again.get(way, (0.0, 0))
            wait = min(RETRY * 2.0 ** min(failures, 20), LONGEST_RETRY)
            self._again[way] = (self._steady() + wait, failures + 1)
            log.warning(
                "alert: no one is told by %s that %s %s: %s; tried again in %.0f minutes",
                *(way, " and ".join(keys[:3]), "is over" if state == OVER else "has begun"),
                *(_harmless(str(error)), wait / 60),
            )
            return
        self._again.pop(way, None)
        log.info("alert: told by %s: %s %s", way, state, _harmless(", ".join(keys[:MOST_TOLD])))
        for key in keys:
            told = self._known[key]["told"]
            told.append(way) if state == BEGUN else told.remove(way)
        self._keep()  # at once: what is told is not told again

    def _command(self, state: str, keys: Sequence[str]) -> None:
        facts = {
            "ALERT_STATE": state,
            "ALERT_TROUBLES": "\n".join(keys),
            "ALERT_SINCE": _when(min(self._known[key]["since"] for key in keys)),
            "ALERT_SUBJECT": self._subject(state, keys),
            "ALERT_PROJECT": str(self._server.project),
        }
        text = self._text(state, keys)
        environment = {**command_environment(self._server.settings), **facts}
        self._run(self._settings.command, text, environment, self._server.project)

    def _mail(self, state: str, keys: Sequence[str]) -> None:
        to = self._settings.mail
        assert to is not None
        message = EmailMessage()
        message["Subject"] = self._subject(state, keys)
        message["From"] = self._settings.sender or to
        message["To"] = to
        message["Date"] = formatdate(self._clock(), localtime=True)
        message["Message-ID"] = make_msgid(domain=to.rpartition("@")[2])
        message["Auto-Submitted"] = "auto-generated"  # RFC 3834 5
        message.set_content(self._text(state, keys), cte="quoted-printable")
        self._server.send(message, to)

    def _subject(self, state: str, keys: Sequence[str]) -> str:
        named = _harmless(keys[0]) + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        what = "is over" if state == OVER else "needs you"
        project = _harmless(self._server.project.name)  # a host may have several
        return f"[{socket.gethostname()}] salmon-revsmtp in {project}: {named} {what}"

    def _text(self, state: str, keys: Sequence[str]) -> str:
        lines = []
        for key in keys[:MOST_TOLD]:
            known = self._known[key]
            since = _when(known["since"])
            over = "This is over; it was so: " if state == OVER else ""
            lines.append(f"{over}{_harmless(known['text'])}\n({_harmless(key)}, since {since})\n")
        if len(keys) > MOST_TOLD:
            lines.append(f"And {len(keys) - MOST_TOLD} more; see `salmon-revsmtp status`.\n")
        return "\n".join(lines)

    # -- memory ---------------------------------------------------------------------------------

    def _recall(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self._file.read_text())
            return {
                str(key): {
                    "since": float(one["since"]),
                    "text": str(one["text"]),
                    "told": [str(way) for way in one["told"]],
                }
                for key, one in found.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("alert: %s cannot be read: %s; it is begun anew", self._file, error)
            return {}

    def _keep(self) -> None:
        text = json.dumps(self._known)
        beside = self._file.with_name(f".{self._file.name}")
        try:
            if self._file.exists() and self._file.read_text() == text:
                return
            with os.fdopen(os.open(beside, _NEW, 0o600), "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.rename(self._file)
        except OSError as error:
            log.warning(
                "alert: %s cannot be written: %s; after a restart someone may be told twice",
                *(self._file, error),
            )


_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC


def command_environment(settings: object) -> dict[str, str]:
    """That of the server, without the variables that have a password of the settings in them: a
    program that tells you has no need of those."""
    keys = [
        one
        for name in ("collection_agents", "customer_accounts")
        for one in getattr(settings, name, None) or ()
    ]
    secrets = [str(one["password"]) for one in keys if one.get("password")]
    hold = (getattr(settings, "provider", None) or {}).get("hold")
    secrets += [str(hold)] if "://" in str(hold) else []
    return {
        name: value
        for name, value in os.environ.items()
        if not any(secret in value for secret in secrets)
    }


def run_command(
    command: Sequence[str],
    text: str,
    environment: Mapping[str, str],
    folder: Path,
    timeout: float = COMMAND_TIMEOUT,
) -> None:
    """Run a command in a folder, with a text on its standard input and this environment.
    Raises :class:`OSError` when it cannot be run, fails, or takes longer than ``timeout`` seconds;
    then it is killed, with what it has started."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(text.encode())
        given.seek(0)
        process = subprocess.Popen(
            list(command),
            stdin=given,
            stdout=said,
            stderr=said,
            cwd=folder,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise OSError(f"{command[0]} has not ended in {timeout:g} seconds") from None
        if status:
            said.seek(0)
            words = " ".join(said.read(MOST_SAID).decode("utf-8", "replace").split())
            raise OSError(f"{command[0]} ended with status {status}: {words or 'it said nothing'}")


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _harmless(text: str) -> str:
    """Without what a terminal or a log would obey: a provider's words are in it."""
    return "".join(char if char.isprintable() else "?" for char in text)
