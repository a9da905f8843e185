# Each target works from a fresh clone with nothing else done before it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run demo test bench lint clean

run: .venv/run
	$(BIN)/python chatproxy.py serve

demo: .venv/run
	$(BIN)/python chatproxy.py serve --demo

test: .venv/test
	$(BIN)/python -m pytest -q -rs -n 2 test_chatproxy.py

bench: .venv/test
	$(BIN)/python test_chatproxy.py bench

lint: .venv/test
	$(BIN)/ruff check $(STYLE) --select E4,E7,E9,F,B,SIM,UP,I,C4,RET,PIE .
	$(BIN)/ruff format --check $(STYLE) .
	$(BIN)/mypy --strict-optional --disallow-untyped-defs --warn-unused-ignores chatproxy.py test_chatproxy.py

clean:
	rm -rf .venv

# The rules are here and not in a file of their own: pyflakes, bugbear, simplify, pyupgrade, import order and the like.
STYLE := --isolated --config 'line-length = 110' --config 'target-version = "py310"'

.venv/run:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q 'curl_cffi>=0.16,<0.17' 'click>=8.1'
	touch $@

.venv/test: .venv/run
	$(BIN)/pip install -q pytest pytest-xdist hypothesis httpx openai pillow 'pydantic-ai-slim[openai]>=2' trustme hypercorn playwright websockets anthropic ollama ruff mypy
	touch $@
