"""A relay that is given messages for the world: a process.

``python -m benchmarks.relay FILE`` prints its port, and writes the recipients of each message into
the file, a line each.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from benchmarks.processes import end_with_parent

__all__: list[str] = []

_ANSWERS = {b"DATA": b"354 go on\r\n", b"QUIT": b"221 bye\r\n"}


async def main(file: Path) -> None:
    """The process."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 relay.example.net\r\n")
        recipients: list[str] = []
        while line := await reader.readline():
            writer.write(_ANSWERS.get(line[:4].upper(), b"250 ok\r\n"))
            if line[:4].upper() == b"RCPT":
                recipients.append(line.decode("ascii", "replace").strip())
            if line[:4].upper() == b"DATA":
                while await reader.readline() not in (b".\r\n", b""):
                    pass
                with file.open("a") as told:
                    print(*recipients, file=told)
                recipients = []
                writer.write(b"250 ok\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    end_with_parent()
    asyncio.run(main(Path(sys.argv[1])))
