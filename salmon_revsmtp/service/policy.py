"""The policy of an inbound SMTP service: what we are called, who may send what to whom."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Iterable
from functools import cached_property

from salmon_revsmtp.hostname import machine_name
from salmon_revsmtp.service.settings import ANY_DOMAIN, ServiceSettings
from salmon_revsmtp.smtp.addresses import domain_of
from salmon_revsmtp.smtp.limits import Limits
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Service"]


class Service:
    """The policy of one inbound SMTP service.  ``name`` is its key in ``smtp_services``."""

    def __init__(self, name: str, settings: ServiceSettings) -> None:
        self.name = name
        self.settings = settings
        self._allow = [ipaddress.ip_network(network) for network in settings.allow]
        self._deny = [ipaddress.ip_network(network) for network in settings.deny]

    @cached_property
    def hostname(self) -> str:
        """What we call ourselves.  May ask DNS for the machine's name, once, and block then."""
        return self.settings.hostname or machine_name()

    async def find_hostname(self) -> str:
        """:attr:`hostname`, without blocking the event loop."""
        return await asyncio.to_thread(lambda: self.hostname)

    @property
    def limits(self) -> Limits:
        """The machine's limits with what the user has set, and what grows with it."""
        message, recipients = self.settings.max_message_size, self.settings.max_recipients
        return Limits(
            message=message,
            recipients=recipients,
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
