# The two commands: `make run` and `make test`. Each makes its own environment if there is none.
.DEFAULT_GOAL := help
.PHONY: help run test report walk-forward hpo-run bench ablation chains kills lint types lab docs export outputs env
SHELL := /bin/bash
BIN := .venv/bin
EPOCHS ?= 3
RUN ?= runs/embedded
DATA ?=
GOLDEN ?=
# the first python that is new enough
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

.venv/.installed: settings.ini setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no python 3.11 or newer found; install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the environment into .venv (once, a few minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

env: .venv/.installed ## make the environment in .venv

run: env ## train phases 0 to 4 on the embedded market, then write the report
	$(BIN)/papermill nbs/03_phases.ipynb -p phase 0-4 -p max_epochs $(EPOCHS) -p run_dir $(RUN) -p report_dir reports
	$(BIN)/papermill nbs/04_eval.ipynb -p run_dir $(RUN) -p report_dir reports
	@echo; cat $(RUN)/verdict.txt

# threads that take turns on a core cost twice the time; a third of the tests' time is waiting, so four share two cores
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
test: env ## run every test: the notebooks, then tests/ (DATA=folder of market data, GOLDEN=folder of outputs of the published layers)
	$(ONE_THREAD) $(BIN)/nbdev_test --n_workers 2
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 4 --dist worksteal --durations 12 $(if $(DATA),--data $(DATA)) $(if $(GOLDEN),--golden $(GOLDEN)) tests

report: env ## write the evaluation report of a run: make report RUN=runs/NAME
	$(BIN)/papermill nbs/04_eval.ipynb -p run_dir $(RUN) -p report_dir reports

SEEDS ?= 0
YEARS ?=
OPTIONS ?=
walk-forward: env ## train every year (YEARS=2013-2017) by every seed (SEEDS=0,1,2) and report on all of it; killed, it goes on (DATA=folder, OPTIONS="--stride 21 ...")
	$(BIN)/python -m atft.folds --min-train 200 --seeds $(SEEDS) --max-epochs $(EPOCHS) $(if $(YEARS),--test-years $(YEARS)) $(if $(DATA),--data $(abspath $(DATA)) --run-dir runs/walk-$(notdir $(abspath $(DATA)))) $(OPTIONS)

TRIALS ?= 20
hpo-run: env ## search over the phase table on the embedded market, or on DATA=folder; killed, it goes on; writes reports/hpo_summary_YYYYMMDD.md
	$(BIN)/papermill nbs/05_hpo.ipynb -p n_trials $(TRIALS) -p report_dir reports $(if $(DATA),-p data $(abspath $(DATA)) -p study_dir runs/hpo-$(notdir $(abspath $(DATA))))

STEPS := -p hidden 256 -p heads 8 -p epochs 2 -p precisions float32,bfloat16 -p compiled True
bench: env ## measure every speed claim beside its peers, a few minutes; writes reports/bench_YYYYMMDD.md (DATA=folder for the scaler's error)
	$(BIN)/papermill nbs/06_bench.ipynb -p codes 3818 -p days 750 -p features 64 -p rounds 7 -p nodes 3818,10000 -p samples 1024 $(STEPS) $(if $(DATA),-p data $(abspath $(DATA))) -p report_dir reports

ABLATION := -p codes 100 -p days 600 -p base_epochs 4 -p epochs 3 -p chain_epochs 5 -p hidden 16 -p run_dir runs/ablation -p report_dir reports
ablation: env ## what each part of the network adds on generated markets; an hour or more, continues where it stopped; writes reports/fan_san_YYYYMMDD.md
	$(BIN)/papermill nbs/07_ablation.ipynb -p markets peers,periodic,shift,all,none -p seeds 0,1,2,3,4 -p branches "graph,fan,fan + levels,san,levels,RevIN,LayerNorm" -p chain_seeds 0,1,2,3,4 $(ABLATION)

LARGE := -p chain_seeds 0,1,2,3,4 -p chain_epochs 3 -p codes 400 -p days 1500 -p cycle_days 240 -p regime_days 80
REAL := -p chain_seeds 0,1,2 -p chain_epochs 1 -p options valid=2015-01-01,test=2016-01-01,train_days=500,days_per_step=2
chains: env ## the phases one after another with several seeds, on a large market whose cycles and regimes stay, or on DATA=folder; an hour, continues where it stopped; writes reports/chains_YYYYMMDD.md
	$(BIN)/papermill nbs/07_ablation.ipynb -p markets - -p branches - -p hidden 32 $(if $(DATA),-p data $(abspath $(DATA)) $(REAL),$(LARGE)) -p run_dir runs/ablation -p report_dir reports

kills: env ## kill a run 20 times, its saving 500 times and a search 10 times, fill the disk 20 times, race for 60 seconds; writes reports/kills_YYYYMMDD.md
	$(BIN)/python -m pytest -q tests/test_resume.py tests/test_panel.py tests/test_hpo.py --durations 12 --kills 20 --race-seconds 60 --kills-report reports

lint: env ## look for lines that are too wide and names that are unused or unknown, in notebooks, package and tests
	$(BIN)/ruff check

# methods that notebooks add to a class by @patch stand in it in what setup.py builds
types: env ## check the types of the public interface as a user's script sees it, and of the package
	@rm -rf build/types
	$(BIN)/python setup.py -q build_py --build-lib build/types
	MYPYPATH=build/types:tests $(BIN)/mypy

lab: env ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

docs: env ## render the site into _docs (needs the quarto program)
	@command -v quarto >/dev/null || { echo "make docs: the quarto program is not installed; get it from quarto.org, then run this again"; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" quarto render

export: env ## write atft/ and the page of its names from the notebooks, and clean them
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean
	$(BIN)/python -c "from atft.project import write_reference; write_reference()"

NOTEBOOKS ?= nbs/*.ipynb
outputs: env ## run every notebook and store what it shows, without progress, clocks and temporary paths; half an hour (NOTEBOOKS="nbs/02c_losses.ipynb ...")
	$(ONE_THREAD) $(BIN)/python tests/outputs.py $(NOTEBOOKS) && $(BIN)/nbdev_clean
