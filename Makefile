# Each target works from a fresh clone with nothing else done before it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run demo test bench lint agents clean

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

# The coding agents that the tests have at work, in the versions that were tried: 3 GB. Without them those are skipped.
agents: .agents/npm .agents/old .agents/aider

clean:
	rm -rf .venv .agents

# The rules are here and not in a file of their own: pyflakes, bugbear, simplify, pyupgrade, import order and the like.
STYLE := --isolated --config 'line-length = 110' --config 'target-version = "py310"'

.venv/run:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q 'curl_cffi>=0.16,<0.17' 'click>=8.1'
	touch $@

NPM := npm install --no-fund --no-audit --loglevel=error

.agents/npm:
	$(NPM) --prefix .agents node@24 @openai/codex@0.169.0 @github/copilot@1.0.102 cline@3.0.65 opencode-ai@1.18.33 \
		@anthropic-ai/claude-code@2.1.330 @qwen-code/qwen-code@0.24.4 @continuedev/cli@1.5.47
	touch $@

.agents/old:
	$(NPM) --prefix $@.installed @openai/codex@0.145.0
	mv $@.installed $@

.agents/aider:
	$(PYTHON) -m venv .agents/venv
	.agents/venv/bin/pip install -q aider-chat==0.86.2
	touch $@

.venv/test: .venv/run
	$(BIN)/pip install -q pytest pytest-xdist hypothesis httpx openai pillow 'pydantic-ai-slim[openai]>=2' trustme hypercorn playwright websockets anthropic ollama ruff mypy
	touch $@
