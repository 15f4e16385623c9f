# make demo: train two studies and print where their reports are. make test: all checks. Both install into .venv when needed.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: demo test clean

demo: $(STAMP)
	$(BIN)/shoal run sanity --out runs/demo/sanity
	$(BIN)/shoal run grokking --preset fast --out runs/demo/grokking
	@echo; echo "Reports:"; ls $(CURDIR)/runs/demo/*/report.html

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest -q

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs/demo build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
