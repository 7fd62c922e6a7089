# The recipes are one line each: the work is in scripts/bootstrap.py, which also runs without make.
PYTHON ?= python3

.PHONY: demo test setup clean

demo:  ## Set up once, then show plain and speculative decoding side by side
	@$(PYTHON) scripts/bootstrap.py demo

test:  ## Lint, types and every test
	@$(PYTHON) scripts/bootstrap.py test

setup:  ## Only the virtual environment
	@$(PYTHON) scripts/bootstrap.py

clean:  ## Remove the virtual environment and build leftovers
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
