"""Commands of Headstart in a process whose `huggingface_hub` talks to the Hub of a test.

The client reads its settings when it is imported, so they are in this process's environment. Each
line of standard input is a request: {"arguments": [...], "token": ...} runs a command, one with
"code" runs Python. The reply is a line with its status and what it wrote.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
import traceback

import torch

if __name__ == "__main__":
    replies, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    really = time.sleep
    time.sleep = lambda seconds: really(min(seconds, 0.01))  # between the client's own retries

    from huggingface_hub.utils import logging
    from typer.testing import CliRunner

    from headstart.scripts import console as ui
    from headstart.scripts.cli import app

    logging.get_logger()  # to this standard error, not to one that a command is given below
    ui.errors._width = ui.console._width = 1000
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.pop("HF_TOKEN", None)
        if request.get("token"):
            os.environ["HF_TOKEN"] = request["token"]
        if "code" in request:
            written = io.StringIO()
            status = 0
            with contextlib.redirect_stdout(written):
                try:
                    exec(request["code"], {})
                except Exception:
                    status = 1
                    traceback.print_exc(file=written)
            text = written.getvalue()
        else:
            result = CliRunner().invoke(app, request["arguments"])
            status, text = result.exit_code, result.output
            if not isinstance(result.exception, SystemExit | None):
                text += "".join(traceback.format_exception(result.exception))
        print(json.dumps({"status": status, "text": text}), file=replies, flush=True)
