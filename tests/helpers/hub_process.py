"""For tests of the Hub: a server, and a process with the real client that runs our commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hub_server import TOKEN, Hub

WORKER = Path(__file__).with_name("hub_worker.py")


class Worker:
    """`hub_worker.py`, with a cache of its own."""

    def __init__(self, hub: Hub, home: Path, **environment: str):
        cut = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE")
        kept = {key: value for key, value in os.environ.items() if key not in cut}
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=kept | settings | environment,
        )

    def _ask(self, **request: Any) -> tuple[int, str]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        return reply["status"], reply["text"]

    def run(self, *arguments: object, token: str | None = TOKEN) -> str:
        status, text = self._ask(arguments=[str(one) for one in arguments], token=token)
        assert status == 0, text
        return text

    def refused(self, *arguments: object, token: str | None = TOKEN) -> str:
        """The message of a command that has to fail as a user's mistake."""
        status, text = self._ask(arguments=[str(one) for one in arguments], token=token)
        assert status == 2 and "Traceback" not in text, text
        return " ".join(text.replace("\u2502", " ").split())

    def code(self, text: str, token: str | None = TOKEN) -> str:
        status, written = self._ask(code=text, token=token)
        assert status == 0, written
        return written.strip()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
