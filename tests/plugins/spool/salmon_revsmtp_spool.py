"""An agent type that collects from a folder: each file in it is one message."""

import logging
from pathlib import Path
from typing import Annotated

import click
from pydantic import Field

from salmon_revsmtp import Agent, AgentSettings, Envelope, Failed, Outcome, hookimpl


class SpoolSettings(AgentSettings):
    """The keys of an agent with ``protocol: "spool"``, beside those that every agent has."""

    folder: Annotated[Path, Field(description="a folder of messages")]
    recipient: Annotated[str, Field(pattern="@", description="the address that gets them")]


class SpoolAgent(Agent):
    protocol = "spool"
    Settings = SpoolSettings

    @property
    def address(self):
        """What the list of agents shows."""
        return str(self.settings.folder)

    @property
    def domains(self):
        """Whose mail we ask for: a service that names no domains accepts these."""
        return (self.settings.recipient.rpartition("@")[2],)

    async def collect(self, collection):
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
def register_agent_types(register):
    register(SpoolAgent)


@hookimpl
def message_delivered(agent, envelope, recipient, reply):
    logging.getLogger("spool").info("%s: %s: %s", agent.name, recipient, reply)


@hookimpl
def register_commands(cli):
    @cli.command()
    @click.argument("folder", type=click.Path(path_type=Path))
    def spool(folder):
        """Count the messages that wait in FOLDER."""
        click.echo(f"{len(list(folder.iterdir()))} waiting")
