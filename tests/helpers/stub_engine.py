"""Answers as a production engine's server does: the same tokens always, and counters of drafts.

    python stub_engine.py vllm|llama.cpp ANSWERS.json [--wrong] [--drafts] [--slow] [--deaf]
        --host H --port P

ANSWERS.json: pairs of a prompt and its answer. --drafts counts three passes for each answer, of
which all, two and one brought the first, second and third guess. --wrong gives other tokens. --slow
takes a minute for an answer. --deaf does not end when it is told to, for as long.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    answered = 0

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._reply(metrics(sys.argv[1].replace(".", ""), Handler.answered))
        elif self.path in ("/health", "/version", "/props"):
            self._reply(json.dumps({"version": "stub", "build_info": "stub"}))
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        if "--slow" in sys.argv:
            time.sleep(60)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answers = {tuple(prompt): answer for prompt, answer in json.loads(ANSWERS.read_text())}
        assert body["temperature"] == 0
        if self.path == "/v1/completions":  # vLLM's
            assert body["model"] == "served" and body["return_token_ids"]
            tokens = answers[tuple(body["prompt"])][: body["max_tokens"]]
        else:
            assert self.path == "/completion" and body["return_tokens"]
            tokens = answers[tuple(body["prompt"])][: body["n_predict"]]
        Handler.answered += 1
        tokens = [token + ("--wrong" in sys.argv) for token in tokens]
        choice = {"token_ids": tokens}
        self._reply(json.dumps({"choices": [choice], "tokens": tokens}))

    def _reply(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


def metrics(name: str, answered: int) -> str:
    if "--drafts" not in sys.argv:
        return f"# nothing\n{name}:other_total 3\n"
    lines = [f'{name}:spec_decode_num_drafts_total{{model_name="x"}} {3.0 * answered}']
    for position in range(3):
        labels = f'model_name="x",position="{position}"'
        came = float((3 - position) * answered)
        lines.append(
            f"{name}:spec_decode_num_accepted_tokens_per_pos_total{{{labels}}} {came}\n"
            f"{name}:spec_decode_num_accepted_tokens_per_pos_created{{{labels}}} 1.7e+09"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    ANSWERS = Path(sys.argv[2])
    if "--deaf" in sys.argv:
        signal.signal(signal.SIGTERM, lambda *_: time.sleep(60))
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
