"""The hooks that a plugin may implement (pluggy; mark them with ``salmon_revsmtp.hookimpl``).

A hook that raises is logged with its plugin's name and costs no mail.  Hooks are called in threads
of their own; they may block, and only their own agent waits for them.  A hook that is called around
a collection and has not returned in five minutes is left out, as if it had raised, and until it
returns it is not called for that agent again.  A hook that is called for a recipient or a message
is part of its delivery: the provider hears 451 when the time for that is over (a minute, or
``handler_timeout``).  No stop waits for a hook.

A hook may be called for several agents at the same time, and with ``delivery_threads`` for several
messages of one agent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from salmon_revsmtp.customer.agent import Agent
    from salmon_revsmtp.customer.report import Report
    from salmon_revsmtp.plugins.facade import Server
    from salmon_revsmtp.provider.hold.store import OpenHoldStore
    from salmon_revsmtp.provider.nodes import Nodes
    from salmon_revsmtp.service.session import Session
    from salmon_revsmtp.smtp.envelope import Envelope
    from salmon_revsmtp.smtp.replies import Reply

hookspec = pluggy.HookspecMarker("salmon_revsmtp")


@hookspec
def register_agent_types(register: Callable[[type[Agent]], None]) -> None:
    """Before the first use of an agent: call ``register(AgentClass)`` for each agent type of the
    plugin."""


@hookspec(firstresult=True)
def may_collect(agent: Agent) -> str | None:
    """Before a scheduled collection: return a reason such as ``"offline"`` to skip it."""


@hookspec
def collection_started(agent: Agent) -> None:
    """A collection of ``agent`` begins."""


@hookspec
def collection_finished(agent: Agent, report: Report) -> None:
    """A collection of ``agent`` has ended as ``report`` says; also when it ended badly."""


@hookspec
def connection_reversed(agent: Agent, session: Session) -> None:
    """Right after the reversal, before our 220: ``session.peer`` is the provider's address."""


@hookspec(firstresult=True)
def recipient_requested(agent: Agent | None, envelope: Envelope, recipient: str) -> Reply | None:
    """At each RCPT, before any data is sent: return a :class:`~salmon_revsmtp.Reply` (4yz or 5yz)
    to refuse the recipient.  Called for those that the service's own settings accept.

    ``envelope`` has the sender, and those recipients that have been accepted so far.  The client
    waits for a minute at most, and hears 451 then.
    ``agent`` is ``None`` for mail that comes to a listening service.
    """


@hookspec(firstresult=True)
def message_received(
    agent: Agent | None,
    envelope: Envelope,
    message: bytes,
    add_field: Callable[[str, str], None],
) -> Reply | None:
    """Before delivery: return a :class:`~salmon_revsmtp.Reply` (4yz or 5yz) to refuse the message,
    and no other plugin is asked about it; or ``None``, and the next one is.  Once for each
    recipient; where mail is held, once for all of a message.

    ``message`` is what the handlers would get: bytes with LF line ends, ``Received:`` on top.
    ``agent`` is ``None`` for mail that came to a listening service.

    ``add_field(name, value)`` marks the message, whichever way it is delivered or held: it gets a
    header field more, beneath our ``Received:`` and above all that came.  A sender may have written
    a field of the same name; the first one is the plugin's.  Those of several plugins stand in the
    order in which they were added, and no plugin finds them in its ``message``.  A long value is
    folded at its blanks.  What would be no field raises :class:`ValueError`: a name with a blank or
    a colon in it, a value that is not printable ASCII (RFC 2047 says how to write other characters
    in it), a word of more than 998 octets, or more than 16 KiB in all.

    A message that is redelivered is known by what came, without these fields.
    """


@hookspec
def message_delivered(
    agent: Agent | None,
    envelope: Envelope,
    recipient: str,
    reply: Reply,
    octets: int,
    seconds: float,
) -> None:
    """After each recipient, with what the delivery said: 2yz delivered, 4yz or 5yz not.

    ``agent`` is ``None`` for mail that came to a listening service.
    ``octets`` is the size of the message as it came.  ``seconds`` is how long the handlers had it,
    or the queue; 0 where a plugin refused it before that.
    """


@hookspec
def message_held(account: str, envelope: Envelope, key: int, octets: int) -> None:
    """At a provider: a message of so many octets is held for ``account``, and safe; ``key`` is its
    number there.

    It waits for no plugin: :func:`message_handed_over` may have been called for it before.
    """


@hookspec
def message_handed_over(
    account: str, envelope: Envelope, recipient: str, reply: Reply, seconds: float | None
) -> None:
    """At a provider, after each recipient: what the customer answered.  2yz: it has the message
    now; 4yz: it is still held; 5yz: its sender is told, by this answer where the message went
    through live, and by a notification where it was held.

    ``seconds`` is how long the message was held before that answer, ``None`` where it went through
    live.
    """


@hookspec
def message_expired(account: str, envelope: Envelope, key: int) -> None:
    """At a provider: a message was held for as long as the account has it, and is gone; its sender
    has been told."""


@hookspec
def quota_exceeded(account: str, messages: int, octets: int) -> None:
    """At a provider: senders hear 452, because so much is held for ``account``.  Once an hour at
    most."""


@hookspec(firstresult=True)
def find_account(name: str, settings: ModuleType) -> Mapping[str, Any] | None:
    """At a provider: the account of that name, where it is somewhere else than in the settings;
    ``None`` if the plugin has none.

    It is a dict as one in ``customer_accounts``: ``{"name": ..., "password": ..., "domains": [...],
    ...}``, with a password or a verifier of it.  The settings win: a name or a domain that they
    have is theirs.  ``settings`` is the project's settings module; a plugin that does not need it
    leaves it out.

    Called in threads, also several times at once.  It may block, and has 10 seconds.  An answer is
    kept for a second, so a change has effect within a second.  If the hook raises or does not
    return, nothing is refused for good: a login hears 454, and a sender 451.  While an account has
    a session open it is asked for now and then; once it is gone, disabled, or has another password,
    its session ends.
    """


@hookspec(firstresult=True)
def account_for(domain: str, settings: ModuleType) -> Mapping[str, Any] | None:
    """At a provider: the account that has this domain (in lower case, IDNA A-labels), as
    :func:`find_account` returns it."""


@hookspec
def list_accounts(settings: ModuleType) -> Iterable[Mapping[str, Any]] | None:
    """At a provider: all accounts of the plugin, as :func:`find_account` returns them, for
    ``provider accounts`` and ``check``.  It may be a generator.  Without this hook a plugin's
    accounts work, and are not listed."""


@hookspec(firstresult=True)
def open_nodes(settings: ModuleType) -> Nodes | None:
    """At a provider, once, when it starts: what its hosts tell one another of sessions and failed
    logins, if there are several of them; a
    :class:`~salmon_revsmtp.provider.nodes.Nodes`."""


@hookspec
def register_hold_stores(register: Callable[[str, OpenHoldStore], None]) -> None:
    """At a provider, before its hold store is opened: call ``register(scheme, open_store)`` for
    each kind of store of the plugin.

    Where ``hold`` in the settings is ``"scheme://..."``, ``open_store(url, folder)`` is called with
    it.  It returns a :class:`~salmon_revsmtp.provider.hold.store.HoldStore`, or raises a
    :class:`~salmon_revsmtp.provider.hold.store.HoldStoreError`, whose text shows no password of the
    URL.  ``folder`` is the store's own on this host, for files; it need not be there.
    """


@hookspec
def check_settings(settings: ModuleType) -> Sequence[str] | None:
    """Before anything starts: return what is wrong with your plugin's own settings in the project's
    settings module, a sentence for each, such as ``alert: after: found '1x', allowed: ...``.  They
    are said with all others, and the server does not start.  :func:`~salmon_revsmtp.validated`
    makes them of a pydantic model.  Called for most commands, so it has to be quick."""


@hookspec
def list_addresses(settings: ModuleType) -> Iterable[tuple[str, int]] | None:
    """Where the plugin is to listen, as hosts and ports: ``check`` says whether it can.  Mail goes
    on where it cannot, so that is a warning."""


@hookspec
def server_started(server: Server) -> None:
    """The server listens and collects.  Each plugin has a thread of its own for this, which may
    block.  What is to go on as long as the server runs has a thread of the plugin's own, which this
    hook starts: a hook that has not returned in five minutes is logged."""


@hookspec
def server_stopping(server: Server) -> None:
    """The server is about to stop.  Each plugin has a thread of its own for this, too, and as much
    time as a stop gives messages: 10 seconds.  Called where ``server_started`` was, also if that
    has not returned yet."""


@hookspec
def register_commands(cli: click.Group) -> None:
    """Add click commands to ``salmon-revsmtp``: ``cli.add_command(...)``."""
