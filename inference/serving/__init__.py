"""An OpenAI-compatible HTTP server for one model. Start reading at `server.py`."""
