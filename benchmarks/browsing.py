"""Browsers that look at a console: a process.

``python -m benchmarks.browsing FOLDER NUMBER`` lets so many in at the console of the server that
runs in a project's folder, and prints ``{"open": NUMBER}`` when all of them have a page and hear
events.  Each does what the console's own script does: at an event it fetches its page again, with
others that come soon after, and rests the longer the longer that took.  On a line of its standard
input it prints ``{"events": ..., "pages": ...}``: how many there have been.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from salmon_revsmtp.console.links import Running

__all__: list[str] = []

# What the script has: seconds from an event to the look, and the rest after one.
LEAST, REST, LONGEST_REST = 0.4, 25, 15.0
TIMEOUT = 60.0

PAGES = ("/", "/agents", "/agents/isp", "/log")


class Browser:
    """One of them."""

    def __init__(self, running: Running, page: str) -> None:
        self._address = running.listen
        self._page = page
        self._host = urlsplit(running.url).netloc
        self._cookie = ""
        self.events = self.pages = 0
        self.open, self.there = threading.Event(), threading.Event()
        self._news = threading.Event()
        enter = urlsplit(running.link())
        answer, _ = self._get(f"{enter.path}?{enter.query}")
        self._cookie = (answer.getheader("set-cookie") or "").partition(";")[0]

    def start(self) -> None:
        for work in (self._listen, self._look):
            threading.Thread(target=work, daemon=True).start()

    def _get(
        self, path: str, **headers: str
    ) -> tuple[http.client.HTTPResponse, http.client.HTTPConnection]:
        connection = http.client.HTTPConnection(*self._address, timeout=TIMEOUT)
        given = {"Host": self._host, **({"Cookie": self._cookie} if self._cookie else {})}
        connection.request("GET", path, headers={**given, **headers})
        return connection.getresponse(), connection

    def _listen(self) -> None:
        answer, _ = self._get("/events")
        if answer.status != 200:
            raise SystemExit(f"/events: {answer.status}")
        for line in answer:
            if b"hello" in line:
                self.open.set()
            if line.startswith(b"data: "):
                self.events += 1
                event = json.loads(line[6:])
                if event["kind"] != "log" or self._page == "/log":
                    self._news.set()

    def _look(self) -> None:
        live: dict[str, str] = {}
        while True:
            began = time.monotonic()
            answer, connection = self._get(self._page, **live)
            answer.read()
            connection.close()
            took = time.monotonic() - began
            self.pages += answer.status == 200
            self.there.set()
            live = {"X-Live": "1"}
            self._news.clear()
            time.sleep(min(took * REST, LONGEST_REST))
            self._news.wait()
            time.sleep(LEAST)


def main(folder: str, number: str) -> None:
    """Browse until standard input ends."""
    running = Running.read(Path(folder))
    if running is None:
        raise SystemExit("there is no console")
    browsers = [Browser(running, PAGES[one % len(PAGES)]) for one in range(int(number))]
    for one in browsers:
        one.start()
    for one in browsers:
        one.open.wait(TIMEOUT)
        one.there.wait(TIMEOUT)
    print(json.dumps({"open": len(browsers)}), flush=True)
    for _ in sys.stdin:
        seen = {"events": sum(one.events for one in browsers)}
        print(json.dumps({**seen, "pages": sum(one.pages for one in browsers)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
