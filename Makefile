# Each target works from a fresh clone with nothing else done before it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run demo test bench soak lint agents dist release clean

run: .venv/run
	$(BIN)/python chatproxy.py serve

demo: .venv/run
	$(BIN)/python chatproxy.py serve --demo

# Tests that go by the clock have the machine to themselves: beside others they would measure those.
test: .venv/test
	$(BIN)/python -m pytest -q -rs -o markers=alone -n 3 -m 'not alone' test_chatproxy.py
	$(BIN)/python -m pytest -q -rs -o markers=alone -m alone test_chatproxy.py

bench: .venv/test
	$(BIN)/python test_chatproxy.py bench

# Thirty minutes of mixed work on one server: what grows, and what is left over.
MINUTES ?= 30
soak: .venv/test
	$(BIN)/python test_chatproxy.py soak $(MINUTES)

# The one file, and its checksum.
dist:
	rm -rf dist && mkdir dist
	cp chatproxy.py dist/
	cd dist && sha256sum chatproxy.py > SHA256SUMS

# The same, tried with nothing but its two packages: it tells its version, and the demo answers.
release: dist
	rm -rf .release && $(PYTHON) -m venv .release
	.release/bin/pip install -q 'curl_cffi>=0.16,<0.17' 'click>=8.1'
	cd dist && ../.release/bin/python -I chatproxy.py --version
	cd dist && ../.release/bin/python -c "$$TRY" $(abspath .release/bin/python)
	rm -rf .release

define TRY
import json, re, subprocess, sys, urllib.request
words = [sys.argv[1], "-I", "chatproxy.py", "serve", "--demo", "--port", "0"]
server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
try:
    url = re.search(r"listening on ([^ ,]+)", server.stderr.readline())[1]
    body = json.dumps({"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}).encode()
    asked = urllib.request.Request(url + "/chat/completions", body, {"Authorization": "Bearer demo"})
    print(json.load(urllib.request.urlopen(asked, timeout=60))["choices"][0]["message"]["content"])
finally:
    server.terminate()
sys.exit(server.wait(60))
endef
export TRY

lint: .venv/test
	$(BIN)/ruff check $(STYLE) --select E4,E7,E9,F,B,SIM,UP,I,C4,RET,PIE .
	$(BIN)/ruff format --check $(STYLE) .
	$(BIN)/mypy --strict-optional --disallow-untyped-defs --warn-unused-ignores chatproxy.py test_chatproxy.py

# The coding agents that the tests have at work, in the versions that were tried: 3 GB. Without them those are skipped.
agents: .agents/npm .agents/old .agents/aider

clean:
	rm -rf .venv .agents .release dist

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
	$(BIN)/pip install -q pytest pytest-xdist hypothesis httpx openai pillow 'pydantic-ai-slim[openai]>=2' trustme hypercorn playwright axe-playwright-python websockets anthropic ollama 'psycopg[binary]>=3.2,<4' ruff mypy
	touch $@
