# make demo: from nothing to text emerging from noise.  make test: the whole suite.  make check: its fast part.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test check
demo: .venv/ready
	$(PY) data/prepare_pydoc.py
	$(PY) train.py demo --resume auto
	$(PY) evaluate.py out/demo --split test --repeats 4 --baselines
	$(PY) sample.py out/demo --show --batch_size 8 --temperature 0.7 --known_words

test: .venv/all
	$(PY) -m pytest -q -rs -n 2 --dist worksteal

check: .venv/all
	$(PY) -m pytest -q -n 2 --dist worksteal -m "not slow"

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)'; exit 1; }
	@$(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || $(PYTHON) -m venv .venv || { \
		echo 'No venv was made, see above. On Debian or Ubuntu: sudo apt install python3-venv, then make again'; exit 1; }
	$(PY) -m pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@

.venv/all: .venv/ready requirements-all.txt
	$(PY) -m pip install --disable-pip-version-check -q -r requirements-all.txt
	@touch $@
