"""One model behind an HTTP API that speaks as OpenAI's does. `server.py` is where to begin."""
