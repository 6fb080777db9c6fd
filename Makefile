# make demo: from nothing to text emerging from noise.  make test: the whole suite.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test
demo: .venv/ready
	$(PY) data/prepare_pydoc.py
	$(PY) train.py demo --resume auto
	$(PY) evaluate.py out/demo --split test --repeats 4 --baselines
	$(PY) sample.py out/demo --show --batch_size 8 --temperature 0.7 --known_words

test: .venv/ready
	$(PY) -m pytest -q -rs -n 2 --dist worksteal

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)'; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo 'This Python lacks the venv module: on Debian or Ubuntu, sudo apt install python3-venv, then run make again'; exit 1; }
	$(PY) -m pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@
