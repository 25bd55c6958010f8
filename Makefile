# Everything runs in .venv, which the first target makes. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
RUN := $(CURDIR)/.venv/bin

.PHONY: demo test gpu torture lint smoke check clean

demo: .venv/installed            ## both stages and the evaluation on digits, three seeds, under a minute
	$(RUN)/python -m benchmarks.demo

test: .venv/tools                ## the tests
	$(RUN)/pytest -n auto --maxprocesses 4 --dist loadfile

gpu: .venv/tools                 ## once, where there is a GPU: tests, speed, reproduction; again until all is done
	$(RUN)/python -m benchmarks.gpu

torture: .venv/tools             ## an hour of killed runs, failing disks and damaged files
	$(RUN)/python -m benchmarks.torture
	$(RUN)/python -m benchmarks.fuzz

lint: .venv/tools                ## style and types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

smoke: .venv/installed           ## the demo, only its table; fails where stage 2 does not help
	@mkdir -p output
	$(RUN)/python -m benchmarks.demo > output/demo.log; status=$$?; tail -n 7 output/demo.log; exit $$status

check: lint test smoke           ## what CI runs

clean:                           ## removes .venv and caches; data, output and checkpoints stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(RUN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/tools: requirements-dev.txt .venv/installed
	$(RUN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
