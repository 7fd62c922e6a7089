"""A stand-in for another engine's server: fixed responses, and counters of drafts.

    python stub_engine.py vllm|llama.cpp RESPONSES.json [--wrong] [--drafts] [--slow] [--deaf]
        --host H --port P

RESPONSES.json: pairs of a prompt and its response.
--drafts: count three drafts per response; all three accept their first draft token, two the second
and one the third. --wrong: respond with other tokens. --slow: take a minute per response. --deaf:
ignore SIGTERM for a minute.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    responded = 0

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._reply(metrics(sys.argv[1].replace(".", ""), Handler.responded))
        elif self.path in ("/health", "/version", "/props"):
            self._reply(json.dumps({"version": "stub", "build_info": "stub"}))
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        if "--slow" in sys.argv:
            time.sleep(60)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        responses = {
            tuple(prompt): response for prompt, response in json.loads(RESPONSES.read_text())
        }
        assert body["temperature"] == 0
        if self.path == "/v1/completions":  # vLLM's
            assert body["model"] == "served" and body["return_token_ids"]
            tokens = responses[tuple(body["prompt"])][: body["max_tokens"]]
        else:
            assert self.path == "/completion" and body["return_tokens"]
            tokens = responses[tuple(body["prompt"])][: body["n_predict"]]
        Handler.responded += 1
        tokens = [token + ("--wrong" in sys.argv) for token in tokens]
        choice = {"token_ids": tokens}
        self._reply(json.dumps({"choices": [choice], "tokens": tokens}))

    def _reply(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


def metrics(name: str, responded: int) -> str:
    if "--drafts" not in sys.argv:
        return f"# nothing\n{name}:other_total 3\n"
    lines = [f'{name}:spec_decode_num_drafts_total{{model_name="x"}} {3.0 * responded}']
    for position in range(3):
        labels = f'model_name="x",position="{position}"'
        accepted = float((3 - position) * responded)
        lines.append(
            f"{name}:spec_decode_num_accepted_tokens_per_pos_total{{{labels}}} {accepted}\n"
            f"{name}:spec_decode_num_accepted_tokens_per_pos_created{{{labels}}} 1.7e+09"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    RESPONSES = Path(sys.argv[2])
    if "--deaf" in sys.argv:
        signal.signal(signal.SIGTERM, lambda *_: time.sleep(60))
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
