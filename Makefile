# Everything lives in .venv; the only thing needed first is Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long test-lowest test-newest test-browser lint licenses clean

demo: .venv/ready
	$(BIN)/semantic-anchor demo --out out/demo

test: .venv/ready lint
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

# Sweeps over every family, hostile inputs and faults by the hundred, file by file; broken off, it goes on where it was.
# ONLY="tests/reliability tests/data" for some; the counts are in out/long/summary.md.
test-long: .venv/ready
	$(BIN)/python -m tests.long_run $(ONLY)

# The fast suite with the lowest versions that pyproject.toml allows, and with the newest (torch stays as pinned).
test-lowest test-newest: test-%:
	$(PYTHON) -m tests.bounds $* out/$*

# The nodes in Chromium, in ComfyUI's front end and in the newest one; screenshots in out/browser.
test-browser: .venv/ready out/front_end/ready
	$(BIN)/pip install --quiet playwright
	COMFYUI_FRONT_END=$(CURDIR)/out/front_end/comfyui_frontend_package/static BROWSER_SCREENSHOTS=out/browser \
		$(BIN)/python -m pytest -m browser -rs tests/browser

out/front_end/ready: .venv/ready
	$(BIN)/pip install --quiet --no-deps --target out/front_end comfyui-frontend-package
	touch $@

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

licenses: .venv/ready
	$(BIN)/python docs/licenses.py

# torch first and pinned, so that a range in another package's requirements does not choose it.
.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv out
