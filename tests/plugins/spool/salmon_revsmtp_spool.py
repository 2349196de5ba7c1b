"""An agent type that collects from a folder: each file in it is one message."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import click
from pydantic import Field

from salmon_revsmtp import (
    Agent,
    AgentSettings,
    Collection,
    Envelope,
    Failed,
    Outcome,
    Reply,
    hookimpl,
)


class SpoolSettings(AgentSettings):
    """The keys of an agent with ``protocol: "spool"``, beside those that every agent has."""

    folder: Annotated[Path, Field(description="a folder of messages")]
    recipient: Annotated[str, Field(pattern="@", description="the address that gets them")]


class SpoolAgent(Agent):
    protocol = "spool"
    Settings = SpoolSettings

    @property
    def address(self) -> str:
        """What the list of agents shows."""
        return str(self.settings.folder)

    @property
    def domains(self) -> tuple[str, ...]:
        """Whose mail we ask for: a service that names no domains accepts these."""
        return (self.settings.recipient.rpartition("@")[2],)

    async def collect(self, collection: Collection) -> Outcome:
        try:
            files = sorted(self.settings.folder.iterdir())
        except OSError as error:
            raise Failed(f"reading {self.address}: {error.strerror}") from None
        envelope = Envelope("", (self.settings.recipient,))
        for file in files:
            [reply] = await collection.deliver(envelope, file.read_bytes())
            if reply.positive:  # now it is safe, and only now
                file.unlink()
        return Outcome.COLLECTED if files else Outcome.NO_MAIL


@hookimpl
def register_agent_types(register: Callable[[type[Agent]], None]) -> None:
    register(SpoolAgent)


@hookimpl
def message_delivered(agent: Agent | None, recipient: str, reply: Reply) -> None:
    came_by = agent.name if agent else "a listening service"  # no agent collected it
    logging.getLogger("spool").info("%s: %s: %s", came_by, recipient, reply)


@hookimpl
def register_commands(cli: click.Group) -> None:
    @cli.command()
    @click.argument("folder", type=click.Path(path_type=Path))
    def spool(folder: Path) -> None:
        """Count the messages that wait in FOLDER."""
        click.echo(f"{len(list(folder.iterdir()))} waiting")
