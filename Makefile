# make demo      the three scripts on scikit-learn's digits: a first result in minutes, no download of data
# make test      the test suite
# make bench     the search and the training against the usual loops: two tables and two JSON files in under 10 minutes
# make table     every class of CIFAR-10 in turn against the nine others: hours; goes on where it stopped
# make cifar10   the three scripts with their defaults, on CIFAR-10 (hours without a GPU)
# make lint      ruff

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := outputs/digits-1
# for figures from CIFAR-10: make bench BENCH_RUN=outputs/cifar10-automobile BENCH_DATA="--dataset cifar10"
BENCH_RUN := outputs/digits-1-64
BENCH_DATA := --dataset digits

# for the JPEG copy: make table TABLE="--dataset data/cifar10-jpeg --seeds 0 1 2"
TABLE :=

.PHONY: demo test bench table cifar10 lint clean

demo: $(VENV)/installed
	$(BIN)/python train_gan.py --dataset digits --normal-class 1 --run-dir $(DEMO) \
	    --image-size 32 --ngf 16 --ndf 16 --batch-size 16 --epochs 105
	$(BIN)/python fit_latent.py --run-dir $(DEMO)
	$(BIN)/python evaluate.py --run-dir $(DEMO)
	@echo
	@echo "Look at:"
	@echo "  $(DEMO)/samples.png            real digits beside generated ones"
	@echo "  $(DEMO)/difference_maps.png    where each test image differs from what G can draw"
	@echo "  $(DEMO)/score_histograms.png   how far normal and anomalous scores lie apart"
	@echo "  $(DEMO)/ranking.png            the most normal and the most anomalous images"
	@echo "  $(DEMO)/scores.csv             a row an image: scores, p_value, flagged"

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

bench: $(VENV)/installed $(BENCH_RUN)/gan.pt
	$(BIN)/python -m benchmarks.latent_search --run-dir $(BENCH_RUN)
	$(BIN)/python -m benchmarks.training $(BENCH_DATA)

outputs/digits-1-64/gan.pt: | $(VENV)/installed
	$(BIN)/python train_gan.py --dataset digits --run-dir $(@D) --batch-size 16 --epochs 30

table: $(VENV)/installed
	$(BIN)/python -m benchmarks.cifar10_table $(TABLE)

cifar10: $(VENV)/installed
	$(BIN)/python train_gan.py
	$(BIN)/python fit_latent.py --run-dir outputs/cifar10-automobile
	$(BIN)/python evaluate.py --run-dir outputs/cifar10-automobile

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install "pytest>=8.4" "ruff>=0.17"
	touch $@

clean:
	rm -rf $(VENV)
