"""The policy of an inbound SMTP service: what we are called, who may send what to whom."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
from collections import Counter
from collections.abc import Callable, Iterable

from salmon_revsmtp.hostname import machine_name
from salmon_revsmtp.net.expected import Expected
from salmon_revsmtp.service.settings import ANY_DOMAIN, ServiceSettings
from salmon_revsmtp.smtp.addresses import AddressError, domain_of, to_ascii
from salmon_revsmtp.smtp.budget import Budget
from salmon_revsmtp.smtp.limits import Limits
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Service"]


class Service:
    """The policy of one inbound SMTP service.

    ``name``     its key in ``smtp_services``.
    ``written``  its domains, and those that its agents ask for, as the settings have them.
    ``servers``  the host names from which its agents have mail sent to us.

    ``memory``   what all messages that come may take together, and those that wait to be handled.
    ``strangers`` the part of it that clients may take who connect of themselves: the rest is for
                 reversed sessions, and for those clients that places are kept for.
    ``expected`` those clients.
    ``forwarders`` the addresses of clients whose XFORWARD is believed.
    ``answered`` how often each reply code was said to a message, or to a recipient or message that
                 was refused before it came to its end; ``octets`` are those of messages taken.
    ``listens``  a server runs that has its ``listen`` addresses: what ETRN asks for arrives.
    """

    def __init__(
        self,
        name: str,
        settings: ServiceSettings,
        written: Iterable[str] = (),
        servers: Iterable[str] = (),
    ) -> None:
        self.name = name
        self.settings = settings
        self.listens = False
        self.answered: Counter[int] = Counter()
        self.octets = 0
        self.memory = Budget(settings.memory)
        self.strangers = Budget(settings.memory - settings.memory // 4, self.memory)
        self.expected = Expected(settings.keep_places_for, servers)
        self.forwarders = Expected(settings.forwarded_from)
        self._written: dict[str, str] = {}
        for one in written:
            domain = one.strip(" \t").removeprefix("@").rstrip(".").lower()
            with contextlib.suppress(AddressError):
                self._written.setdefault(to_ascii(domain), domain)
        # A session's recipients are of a few domains.
        self._form = functools.lru_cache(maxsize=256)(self._spelled)
        self._allow = [ipaddress.ip_network(network) for network in settings.allow]
        self._deny = [ipaddress.ip_network(network) for network in settings.deny]

    @functools.cached_property
    def hostname(self) -> str:
        """What we call ourselves.  May ask DNS for the machine's name, once, and block then."""
        return self.settings.hostname or machine_name()

    async def find_hostname(self) -> str:
        """:attr:`hostname`, without blocking the event loop."""
        import asyncio  # only a collection or a server needs it

        return await asyncio.to_thread(lambda: self.hostname)

    @property
    def limits(self) -> Limits:
        """The machine's limits with what the user has set, and what grows with it."""
        message, recipients = self.settings.max_message_size, self.settings.max_recipients
        return Limits(
            message=message,
            recipients=recipients,
            envelope=max(Limits.envelope, 512 * recipients),
            chunks=max(Limits.chunks, message // 1024),
            refusals=max(Limits.refusals, 10 * recipients),
        )

    def refuses_client(self, address: str) -> str | None:
        """The rule that shuts a client's address out, as the settings have it; ``None`` lets it
        in.  ``deny`` wins over ``allow``; an empty ``allow`` admits everyone."""
        client = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(client, ipaddress.IPv6Address) and client.ipv4_mapped:
            client = client.ipv4_mapped
        for network in self._deny:
            if client in network:
                return f"deny {network}"
        if self._allow and not any(client in network for network in self._allow):
            return f"allow {' '.join(str(network) for network in self._allow)}"
        return None

    def recipient_policy(self, asked_for: Iterable[str]) -> Callable[[str], Reply | None]:
        """The function that accepts (``None``) or refuses a recipient.

        Accepted are the service's domains, or, if it has none, those that were asked for.
        """
        accepted = frozenset(self.settings.domains or asked_for)
        anyone = ANY_DOMAIN in accepted
        # RFC 1985 5.2: "@example.org" is example.org and all below it.
        trees = tuple(f".{one[1:]}" for one in accepted if one.startswith("@"))

        def policy(mailbox: str) -> Reply | None:
            domain = domain_of(mailbox)
            # RFC 5321 4.5.1: "postmaster" without a domain is always for us.
            if anyone or domain in accepted or mailbox.lower() == "postmaster":
                return None
            if trees and f".{domain}".endswith(trees):
                return None
            return Reply(550, "we do not take mail for this domain", "5.7.1")

        return policy

    def spell(self, mailbox: str) -> str:
        """A recipient with its domain in the one form that handlers route by, whatever spelling of
        it was accepted (case, trailing dot, U-labels): the form that the settings have, in lower
        case.  What they do not name, as ``"*"`` and ``"@example.org"`` allow, is in A-labels."""
        local, at, domain = mailbox.rpartition("@")
        return f"{local}@{self._form(domain)}" if at else mailbox

    def _spelled(self, domain: str) -> str:
        below, parent = "", domain_of(f"@{domain}") or domain.rstrip(".").lower()
        while parent and parent not in self._written:
            label, dot, parent = parent.partition(".")
            below += label + dot
        return below + self._written.get(parent, parent)
