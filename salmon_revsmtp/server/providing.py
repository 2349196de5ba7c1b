"""The provider's side of a process: the hold store, what fills it, and what hands it over."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import ModuleType

from salmon_revsmtp.delivery.batches import BatchWorker
from salmon_revsmtp.delivery.dispatcher import PendingDelivery
from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.delivery.rates import RateLimit
from salmon_revsmtp.delivery.reporter import Reporter
from salmon_revsmtp.hooks import HookFailedError
from salmon_revsmtp.hostname import machine_name
from salmon_revsmtp.net.certificate import Certificate
from salmon_revsmtp.net.expected import Expected
from salmon_revsmtp.plugins.builtin import POSTGRES_PLUGIN
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.accounts import Accounts
from salmon_revsmtp.provider.etrn import Etrn
from salmon_revsmtp.provider.expiry import Expiry
from salmon_revsmtp.provider.handover import HandOver
from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.provider.hold.places import scheme_of
from salmon_revsmtp.provider.hold.store import HoldStore, HoldStoreError
from salmon_revsmtp.provider.idents import Idents
from salmon_revsmtp.provider.intake import Intake
from salmon_revsmtp.provider.live import Live
from salmon_revsmtp.provider.lookups import Lookups
from salmon_revsmtp.provider.nodes import Nodes
from salmon_revsmtp.provider.notices import Notices
from salmon_revsmtp.provider.server import Provider
from salmon_revsmtp.provider.settings import ProviderSettings
from salmon_revsmtp.provider.settling import Settler
from salmon_revsmtp.server.configuration import Configuration
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.threads import Threads

__all__ = ["Providing", "open_store"]

# Messages that plugins look at, at a time.
FILTERS = 16
# Where a store that is elsewhere has its files on this host.
STORE_FILES = "run/hold"


def open_store(place: str, project: Path, plugins: Plugins) -> HoldStore:
    """The hold store in a folder, or of a URL.  Raises
    :class:`~salmon_revsmtp.provider.hold.store.HoldStoreError`."""
    if (scheme := scheme_of(place)) is None:
        return EmbeddedStore(project / place)
    return plugins.hold_stores[scheme](place, project / STORE_FILES)


class Providing:
    """What a process needs to be a provider; everything is made when it is first asked for.

    ``outbox``  where notifications wait for the relay.
    ``rates``   how many of them there may be.
    ``project`` its folder.
    """

    def __init__(
        self,
        configuration: Configuration,
        plugins: Plugins,
        outbox: Outbox,
        rates: RateLimit,
        project: Path,
    ) -> None:
        self._configuration, self._project = configuration, project
        self._plugins, self._outbox, self._rates = plugins, outbox, rates
        self._worker: BatchWorker[PendingDelivery] = BatchWorker("holding")
        self._provider: Provider | None = None
        self._idents = Idents()
        self._filters = Threads("filters", FILTERS)

    @cached_property
    def settings(self) -> ProviderSettings:
        """Those of the project; the defaults where it has none, and no customers call."""
        return self._configuration.provider or ProviderSettings()

    @cached_property
    def accounts(self) -> Accounts:
        """The customers: those of the settings, and those that plugins have."""
        configuration, lookups = self._configuration, None
        if configuration.elsewhere:
            # What is in the database its hosts tell one another of.
            ours = configuration.elsewhere == {POSTGRES_PLUGIN}
            lookups = Lookups(self._plugins, self._module, told=ours)
        return Accounts(
            configuration.accounts,
            self.settings.keepalive,
            lookups,
            verifiers=configuration.elsewhere == {POSTGRES_PLUGIN},
        )

    @property
    def _module(self) -> ModuleType:
        return self._configuration.module or ModuleType("settings")

    def _nodes(self) -> Nodes | None:
        """The other hosts, where a plugin has a way to them.  Raises :class:`OSError`."""
        try:
            found: Nodes | None = self._plugins.ask("open_nodes", settings=self._module)
        except HookFailedError as error:
            raise HoldStoreError(str(error)) from error
        return found

    @cached_property
    def store(self) -> HoldStore:
        """The hold store.  Raises :class:`~salmon_revsmtp.provider.hold.store.HoldStoreError`."""
        return open_store(self.settings.hold, self._project, self._plugins)

    @cached_property
    def hostname(self) -> str:
        """What the provider calls itself.  May ask DNS, and block."""
        return self.settings.hostname or machine_name()

    @cached_property
    def notices(self) -> Notices:
        """What tells senders of mail that does not get home."""
        return Notices(Reporter(lambda: self.hostname, self._rates), self._outbox)

    @cached_property
    def expiry(self) -> Expiry:
        """What gives up mail that waits for too long."""
        return Expiry(self.accounts, self.store, self.notices, self._plugins)

    @cached_property
    def etrn(self) -> Etrn:
        """What answers ETRN, and sends the mail that it asks for.  Opens the store."""
        settler = Settler(self.store, self.notices.refused, self._plugins)
        return Etrn(self.accounts, self.store, settler, self._served)

    def _served(self, account: str) -> None:
        if self._provider is not None:
            self._provider.served(account)

    def intake(self, service: Service) -> Intake:
        """What a service with ``delivery: "hold"`` gives its messages to."""
        return Intake(
            self.accounts,
            self.store,
            self._plugins,
            lambda: service.hostname,
            self._worker,
            self._filters,
            service.settings.handler_timeout,
            self.live,
            self._idents,
        )

    @cached_property
    def live(self) -> Live:
        """What asks customers that are there."""
        return Live(self.accounts, self._session)

    def _session(self, account: str, domain: str) -> HandOver | None:
        return self._provider.live(account, domain) if self._provider is not None else None

    def provider(self) -> Provider | None:
        """What customers call; ``None`` where the settings have none.  Blocks."""
        settings = self._configuration.provider
        if settings is None:
            return None
        certificate = None
        if settings.tls_cert is not None:
            certificate = Certificate("provider", settings.tls_cert, settings.tls_key)
        self._provider = Provider(
            self.accounts,
            self.store,
            self.notices.refused,
            self._plugins,
            self.hostname,
            certificate=certificate,
            needs_tls=settings.needs_tls,
            addresses=settings.addresses,
            keepalive=settings.keepalive,
            max_sessions=settings.max_sessions,
            max_sessions_per_address=settings.max_sessions_per_address,
            nodes=self._nodes(),
            balancers=Expected(settings.proxy_from) if settings.proxy_from else None,
        )
        return self._provider

    @property
    def incoming(self) -> Path:
        """Where other processes put what they want held."""
        return self._project / "run/incoming"

    def hold(self, envelope: Envelope, data: bytes) -> Reply:
        """Hold a message for one recipient; returns 250 when it is safe on disk.  Blocks."""
        intake = Intake(
            self.accounts,
            self.store,
            self._plugins,
            lambda: self.hostname,
            self._worker,
            self._filters,
        )
        return intake.hold(envelope, data)

    async def stop(self, grace: float) -> None:
        """Ask no customer, and send no more mail for ETRN; what is under way has ``grace``
        seconds."""
        self.live.stop()
        if "etrn" in self.__dict__:
            await self.etrn.stop(grace)

    def close(self) -> None:
        """Take no more than what is under way."""
        if "accounts" in self.__dict__ and self.accounts.lookups is not None:
            self.accounts.lookups.close()
        self._filters.close()
        self._worker.close()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for what is under way, for so long at most."""
        self._worker.wait(seconds)

    def leave_store(self) -> None:
        """Other processes may have what this one has of the store, if it was opened.  Blocks."""
        if "store" in self.__dict__:
            self.store.leave()

    def close_store(self) -> None:
        """Let the hold store go, if it was opened."""
        if "store" in self.__dict__:
            self.store.close()
