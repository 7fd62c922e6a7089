"""One benchmark harness for `headstart bench`, `eval`, `demo` and `graft`: start at `runner.py`."""
