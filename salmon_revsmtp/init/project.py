"""What the projects of both ends have in common: boot modules, log, systemd unit; who owns them."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from salmon_revsmtp.init.writing import File, Owner

__all__ = [
    "FOLDERS",
    "ProjectUser",
    "cannot_use",
    "common_files",
    "filled",
    "literal",
    "program",
    "project_user",
    "unit",
]

TEMPLATES = Path(__file__).parent / "templates"

#: Made empty; `salmon start` needs them, and all that is written at run time is in them.
FOLDERS = ("run", "logs")

# Columns of a line of Python.
WIDTH = 100

# Whom a project of root's is for: a network server has no business to be root.
INSTEAD_OF_ROOT = "mail"

# Places that systemd's ProtectHome=yes makes inaccessible.
HOMES = ("/home", "/root", "/run/user")


@dataclass(frozen=True)
class ProjectUser:
    """Who runs the server.  ``owner``: whom root gives the files to; ``None`` if they are ours."""

    name: str
    owner: Owner | None


def project_user(folder: Path, asked: str | None) -> ProjectUser:
    """The user of that name; else whoever makes the project, or for root the owner of the folder,
    or ``mail`` where that is root, too.  Raises :class:`ValueError`."""
    me = os.geteuid()
    if asked is None:
        uid = _owner_above(folder) if me == 0 else me
        found = _by_id(uid) or _by_name("root")
        if me == 0 and uid == 0:
            found = _by_name(INSTEAD_OF_ROOT) or found
    else:
        found = _by_name(asked)
    if found is None:
        raise ValueError(f"there is no user {asked!r} on this machine")
    if me not in (0, found.pw_uid):
        raise ValueError("only root can make a project for another user")
    owner = (found.pw_uid, found.pw_gid) if found.pw_uid != me else None
    return ProjectUser(found.pw_name, owner)


def _by_name(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except (KeyError, ValueError):
        return None


def _by_id(uid: int) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        return None


def _owner_above(folder: Path) -> int:
    there = next(one for one in (folder, *folder.parents) if one.exists())
    return there.stat().st_uid


def cannot_use(user: ProjectUser, *paths: Path) -> list[Path]:
    """Which of these files and folders the user may not read or cannot get to, and this program if
    the user cannot run it.  Only root can tell."""
    if user.owner is None:
        return []
    tried = [(path, ["test", "-r", str(path)]) for path in paths]
    tried.insert(0, (Path(program()[0]), [*program(), "--version"]))
    return [path for path, command in tried if not _works_for(user.owner, command)]


def _works_for(owner: Owner, command: list[str]) -> bool:
    uid, gid = owner
    try:
        done = subprocess.run(
            command, user=uid, group=gid, extra_groups=[], cwd="/", capture_output=True
        )
    except OSError:
        return False
    return done.returncode == 0


def program() -> tuple[str, ...]:
    """The command by which this program is run from anywhere."""
    beside = Path(sys.executable).with_name("salmon-revsmtp")
    if beside.is_file():
        return (str(beside),)
    installed = shutil.which("salmon-revsmtp")
    return (installed,) if installed else (sys.executable, "-m", "salmon_revsmtp")


def common_files() -> list[File]:
    """What both have, but for the settings and the unit."""
    return [
        File("config/__init__.py", b""),
        File("config/boot.py", filled("boot.py")),
        File("config/consumer.py", filled("consumer.py")),
        File("config/logging.conf", filled("logging.conf")),
        File(".gitignore", filled("gitignore")),
    ]


def unit(
    folder: Path, user: ProjectUser, end: str, limits: str = "", capabilities: str = ""
) -> File:
    """The systemd unit ``revsmtp-END.service``.  ``capabilities``: those that it is to have."""
    name = f"revsmtp-{end}"
    at_home = any(
        Path(one) in (place, *place.parents)
        for one in HOMES
        for place in (folder, Path(sys.prefix), Path(sys.base_prefix), Path(program()[0]))
    )
    held = [f"CapabilityBoundingSet={capabilities}"]
    if capabilities:
        held.append(f"AmbientCapabilities={capabilities}")
    content = filled(
        "unit.service",
        source=str(folder / f"{name}.service"),
        name=name,
        description=f"Reverse SMTP, the {end}",
        user=user.name,
        folder=_path(folder),
        program=" ".join(_word(one, of_command=True) for one in program()),
        limits=f"{limits}\n" if limits else "",
        writable=" ".join(_word(str(folder / one)) for one in FOLDERS),
        home="read-only" if at_home else "yes",
        capabilities="\n".join(held),
    )
    return File(f"{name}.service", content, public=True)


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _path(folder: Path) -> str:
    """A folder that is the rest of a line, which has no quotes.  A backslash at its end would join
    it with the next line, and a space there would be lost; systemd takes the slash away."""
    text = _escaped(str(folder))
    return f"{text}/" if text.endswith(("\\", " ")) else text


def _word(text: str, of_command: bool = False) -> str:
    """A word of a line in a unit (systemd.syntax(7), systemd.service(5))."""
    text = _escaped(text)
    if of_command:
        text = text.replace("$", "$$")
    if any(one in text for one in " \t'\"\\;"):
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return text


def filled(template: str, /, **values: str) -> bytes:
    """A template with its values."""
    text = (TEMPLATES / f"{template}.template").read_text(encoding="utf-8")
    return Template(text).substitute(values).encode()


def literal(value: object, indent: int = 0, taken: int = 0) -> str:
    """A string, a number or a list of strings as Python has it, in a line that begins with
    ``indent`` spaces and has so many characters ``taken``."""
    if isinstance(value, str | int):
        return json.dumps(value, ensure_ascii=False)
    assert isinstance(value, Sequence)
    items = [literal(one) for one in value]
    line = f"[{', '.join(items)}]"
    if indent + taken + len(line) < WIDTH:
        return line
    inner = "".join(f"{' ' * (indent + 4)}{one},\n" for one in items)
    return f"[\n{inner}{' ' * indent}]"
