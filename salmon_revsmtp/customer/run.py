"""One run of an agent, from its lock to its report."""

from __future__ import annotations

import asyncio
import logging
import time

from salmon_revsmtp.customer.agent import Agent
from salmon_revsmtp.customer.collection import Collection
from salmon_revsmtp.customer.locks import AgentLocks
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.foreign import shortened
from salmon_revsmtp.net.outcome import CollectionError, Outcome
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.replies import without_surrogates

__all__ = ["INTERRUPTED", "run"]

log = logging.getLogger(__name__)

BUSY = (
    "another collection of this agent is running, or a handler that one has started; wait for it "
    "to end"
)

#: The error of a collection that someone ended before the provider had no more.
INTERRUPTED = "interrupted"

# Seconds that something takes before the log says so, once.  A provider that is well answers
# sooner; a handler may take longer.
LONG_WAIT = 60.0


async def run(agent: Agent, collection: Collection, locks: AgentLocks) -> Report:
    """Run a collection of ``agent`` to its end; returns the report, whatever happens.

    Two collections of one agent never run at once, in whatever process: the second is ``busy``.
    So is one in another process while a handler that this one has started still runs.
    """
    report = collection.report
    started = time.monotonic()
    with locks.collecting(agent.name) as ours:
        if not ours:
            report.outcome = Outcome.BUSY
            report.error = BUSY
            return report
        await collection.service.find_hostname()
        await collection.call("collection_started")
        telling = asyncio.ensure_future(_tell_of_long_waits(collection))
        try:
            report.outcome = await agent.collect(collection)
            if collection.stopping and collection.push_since is None:
                report.error = INTERRUPTED
        except CollectionError as error:
            report.outcome, report.error = error.outcome, without_surrogates(str(error))
        except asyncio.CancelledError:
            report.outcome, report.error = Outcome.FAILED, INTERRUPTED
            raise
        except Exception as error:
            log_safely(
                log, logging.ERROR, "agent=%s the agent type has a bug", agent.name, error=True
            )
            report.outcome = Outcome.FAILED
            report.error = without_surrogates(
                f"bug in agent type {agent.protocol!r}: {type(error).__name__}: {error}"
            )
        finally:
            telling.cancel()
            tally = collection.tally
            report.messages, report.recipients = tally.messages, tally.recipients
            report.bytes, report.refused = tally.bytes, tally.refused
            report.seconds = time.monotonic() - started
            if report.error:  # which may quote all that a server said
                report.error = shortened(report.error)
            quiet = report.outcome in (Outcome.NO_MAIL, Outcome.BUSY) or not report.outcome.good
            level = logging.DEBUG if quiet else logging.INFO
            log.log(level, "agent=%s %s", agent.name, _line(report))
        await collection.call("collection_finished", report=report)
    return report


async def _tell_of_long_waits(collection: Collection) -> None:
    told: tuple[str, int] | None = None
    while True:
        what, seconds = collection.doing
        since = what, round(time.monotonic() - seconds)
        if seconds >= LONG_WAIT and since != told and not collection.pushing:
            told = since
            log_safely(
                log, logging.INFO, "agent=%s %s, %.0f s", collection.agent.name, what, seconds
            )
        # A push session waits for mail, as long as it takes.
        await asyncio.sleep(LONG_WAIT if collection.pushing else max(LONG_WAIT - seconds, 1.0))


def _line(report: Report) -> str:
    shown = {key: value for key, value in report.as_dict().items() if key != "agent"}
    return " ".join(f"{key}={value!r}" for key, value in shown.items() if value is not None)
