"""The plugin manager: pluggy, with hooks that cannot break a collection.

The built-in agent types come as a stranger's would: through the entry-point group
``salmon_revsmtp``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import metadata
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pluggy

from salmon_revsmtp.forks import end_child_of
from salmon_revsmtp.hooks import HOOK_TIMEOUT, HookFailedError
from salmon_revsmtp.plugins import hookspecs
from salmon_revsmtp.threads import apart

if TYPE_CHECKING:
    from salmon_revsmtp.customer.agent import Agent
    from salmon_revsmtp.provider.hold.store import OpenHoldStore

__all__ = ["ENTRY_POINTS", "Plugin", "Plugins"]

ENTRY_POINTS = "salmon_revsmtp"

log = logging.getLogger(__name__)

# For whoever waits for a hook in another thread: whose it is.
_inside: ContextVar[list[str] | None] = ContextVar("_inside", default=None)
# For whoever wants to know it: what hooks have raised.
_raised: ContextVar[list[HookFailedError] | None] = ContextVar("_raised", default=None)


@dataclass
class Plugin:
    """One plugin as ``salmon-revsmtp plugins`` shows it; ``error`` says why it did not load."""

    plugin: str
    distribution: str = ""
    version: str = ""
    agent_types: list[str] = field(default_factory=list)
    hooks: list[str] = field(default_factory=list)
    error: str | None = None


class Plugins(pluggy.PluginManager):
    """All plugins and the agent types that they register."""

    def __init__(self) -> None:
        super().__init__("salmon_revsmtp")
        self.add_hookspecs(hookspecs)
        self._loaded: list[Plugin] = []
        self._under_way: dict[tuple[str, str], Future[Any]] = {}

    @classmethod
    def load(cls) -> Plugins:
        """Every plugin of every installed distribution.  One that cannot be imported is logged
        and listed with its error; the others work."""
        plugins = cls()
        points = metadata.entry_points(group=ENTRY_POINTS)
        for point in sorted(points, key=lambda point: point.name):
            plugins._load(point)
        return plugins

    @functools.cached_property
    def agent_types(self) -> dict[str, type[Agent]]:
        """Protocol -> agent class.  The plugins are asked when it is first read, so that a command
        that is not about agents starts without what they import."""
        agent_types: dict[str, type[Agent]] = {}
        self._register("register_agent_types", functools.partial(_register, agent_types))
        return agent_types

    @functools.cached_property
    def hold_stores(self) -> dict[str, OpenHoldStore]:
        """What opens a hold store, by the scheme of its URL.  The plugins are asked when it is
        first read."""
        stores: dict[str, OpenHoldStore] = {}
        self._register("register_hold_stores", functools.partial(_register_store, stores))
        return stores

    def _register(self, hook: str, register: Callable[..., None]) -> None:
        """Call a hook of each plugin by which it registers something; ``register`` is called with
        the plugin first."""
        by_name = {entry.plugin: entry for entry in self._loaded}
        for implementation in getattr(self.hook, hook).get_hookimpls():
            entry = by_name.get(implementation.plugin_name) or Plugin(implementation.plugin_name)
            function = getattr(implementation.function, "__wrapped__", implementation.function)
            try:
                function(functools.partial(register, entry))
            except Exception as error:
                entry.error = f"{type(error).__name__}: {error}"
                log.exception("hook=%s plugin=%s raised", hook, entry.plugin)

    @property
    def loaded(self) -> list[Plugin]:
        """What there is, in the order in which it was found; broken ones too."""
        _ = self.agent_types  # each is listed with its own
        return self._loaded

    def _load(self, point: metadata.EntryPoint) -> None:
        entry = Plugin(point.name)
        if point.dist is not None:
            entry.distribution, entry.version = point.dist.name, point.dist.version
        if any(entry == known for known in self._loaded):
            return  # the same distribution, found twice on sys.path
        self._loaded.append(entry)
        try:
            plugin = point.load()
            self.register(plugin, point.name)
        except Exception as error:
            entry.error = f"{type(error).__name__}: {error}"
            log.error("plugin=%s distribution=%s not loaded: %s", *_who(entry), entry.error)
        else:
            callers = self.get_hookcallers(self.get_plugin(point.name)) or []
            entry.hooks = sorted(caller.name for caller in callers)

    def register(self, plugin: object, name: str | None = None) -> str | None:
        """As pluggy's, but what the plugin's hooks raise is logged, not raised.

        pluggy sees a stand-in that has the plugin's hooks and nothing else.
        """
        name = name or self.get_canonical_name(plugin)
        stand_in = SimpleNamespace()
        for attribute in dir(plugin):
            options = self.parse_hookimpl_opts(plugin, attribute)
            if options is None:
                continue
            hook = getattr(plugin, attribute)
            if not (options.get("wrapper") or options.get("hookwrapper")):
                hook = _guarded(hook, attribute, name)
            setattr(stand_in, attribute, hook)
        return super().register(stand_in, name)

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call a hook; returns what pluggy returns.  Never raises: a wrapper that does is
        logged."""
        try:
            return getattr(self.hook, hook)(**arguments)
        except Exception:
            log.exception("hook=%s a wrapper of it raised", hook)
            return None

    def ask(self, hook: str, **arguments: Any) -> Any:
        """Call a hook where "no" and "I cannot tell now" are not the same.  Raises
        :class:`HookFailedError`, and logs nothing, where a plugin has raised and no other has an
        answer."""
        raised: list[HookFailedError] = []
        token = _raised.set(raised)
        try:
            answer = getattr(self.hook, hook)(**arguments)
        except Exception as error:
            raise HookFailedError(f"hook={hook} a wrapper of it raised: {error}") from error
        finally:
            _raised.reset(token)
        if raised and (answer is None or isinstance(answer, list)):
            raise raised[0]
        return answer

    def ask_each(self, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        """Call a hook; returns each plugin's name and what it has returned, without ``None``.
        Raises :class:`HookFailedError`, and logs nothing, where one has raised."""
        answers = []
        for one in getattr(self.hook, hook).get_hookimpls():
            raised: list[HookFailedError] = []
            token = _raised.set(raised)
            try:
                answer = one.function(*(arguments[name] for name in one.argnames))
            finally:
                _raised.reset(token)
            if raised:
                raise raised[0]
            if answer is not None:
                answers.append((one.plugin_name, answer))
        return answers

    def who_has(self, hook: str) -> set[str]:
        """The names of the plugins that have this hook."""
        return {one.plugin_name for one in getattr(self.hook, hook).get_hookimpls()}

    async def call_apart(self, hook: str, agent: Agent, **arguments: Any) -> Any:
        """Call a hook of a collection in a thread of its own, and wait for it, but no longer than
        :data:`HOOK_TIMEOUT`: it is left out then, as if it had raised.  While it still runs it is
        left out for the same agent, so there is one thread for an agent and a hook.

        Returns what pluggy returns.  Cancelled, it waits no longer.
        """
        import asyncio  # only a collection needs it

        if not self.implemented(hook):
            return None
        key = (hook, agent.name)
        if (before := self._under_way.get(key)) is not None and not before.done():
            log.warning(
                "agent=%s hook=%s still runs since it was called last; it is left out this time",
                *(agent.name, hook),
            )
            return None
        inside: list[str] = []

        def call() -> Any:
            _inside.set(inside)
            return self.call(hook, agent=agent, **arguments)

        try:
            self._under_way[key] = running = apart(f"agent={agent.name} hook={hook}", call)
        except RuntimeError as error:  # the machine has no thread to spare
            log.error("agent=%s hook=%s is left out: %s", agent.name, hook, error)
            return None
        try:
            return await asyncio.wait_for(asyncio.wrap_future(running), HOOK_TIMEOUT)
        except (asyncio.TimeoutError, TimeoutError):
            log.error(
                "agent=%s plugin=%s hook=%s has not returned in %g seconds; it is left out",
                *(agent.name, *inside, hook, HOOK_TIMEOUT),
            )
            return None

    async def call_each_apart(self, hook: str, **arguments: Any) -> None:
        """Call a hook that is about no agent, each plugin's in a thread of its own: one that blocks
        keeps no other from it.  Waits for them, but no longer than :data:`HOOK_TIMEOUT`."""
        import asyncio  # only a server needs it

        running: dict[asyncio.Future[Any], str] = {}
        for one in getattr(self.hook, hook).get_hookimpls():
            given = [arguments[name] for name in one.argnames]
            call = functools.partial(one.function, *given)
            try:
                future = apart(f"plugin={one.plugin_name} hook={hook}", call)
            except RuntimeError as error:  # the machine has no thread to spare
                log.error("plugin=%s hook=%s is left out: %s", one.plugin_name, hook, error)
                continue
            running[asyncio.wrap_future(future)] = one.plugin_name
        if not running:
            return
        try:
            _, late = await asyncio.wait(running, timeout=HOOK_TIMEOUT)
        except asyncio.CancelledError:
            for waiting in running:
                waiting.cancel()
            raise
        for one in late:
            log.error(
                "plugin=%s hook=%s has not returned in %g seconds",
                *(running[one], hook, HOOK_TIMEOUT),
            )

    def implemented(self, hook: str) -> bool:
        """Whether any plugin has this hook, so that no one pays for one that none has."""
        return bool(getattr(self.hook, hook).get_hookimpls())


def _register(agent_types: dict[str, type[Agent]], entry: Plugin, agent_type: type[Agent]) -> None:
    protocol = agent_type.protocol
    known = agent_types.setdefault(protocol, agent_type)
    if known is not agent_type:
        raise ValueError(f"the protocol {protocol!r} is taken by {known.__module__}")
    entry.agent_types.append(protocol)


def _register_store(
    stores: dict[str, OpenHoldStore], entry: Plugin, scheme: str, open_store: OpenHoldStore
) -> None:
    if stores.setdefault(scheme, open_store) is not open_store:
        raise ValueError(f"{entry.plugin}: the scheme {scheme!r} is taken by another plugin")


def _who(entry: Plugin) -> tuple[str, str]:
    return entry.plugin, entry.distribution


def _guarded(function: Callable[..., Any], hook: str, plugin: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*arguments: Any) -> Any:
        if (inside := _inside.get()) is not None:
            inside[:] = [plugin]
        process = os.getpid()
        try:
            try:
                return function(*arguments)
            finally:
                end_child_of(process)
        except Exception as error:
            if (raised := _raised.get()) is not None:
                failed = HookFailedError(f"plugin={plugin} hook={hook} raised {_what(error)}")
                failed.__cause__ = error
                raised.append(failed)
                return None
            log.exception("plugin=%s hook=%s raised; it is left out this time", plugin, hook)
            return None

    return guarded


def _what(error: Exception) -> str:
    """In one line: an error of the system says what it is by itself."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"
