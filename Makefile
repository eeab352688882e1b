# make demo      the three scripts on scikit-learn's digits: a first result in minutes, no download of data
# make washers   the same on pictures with planted defects, and a verdict on new ones: docs/own-pictures.md
# make magnetic-tile REAL=DIR   real defects on a surface; DIR holds magnetic_tile.tar.xz: docs/real-defects.md
# make elpv      real defects of solar cells; installs the package elpv-dataset: docs/real-defects.md
# make test      the test suite
# make bench     the search and the training against the usual loops: two tables and two JSON files in under 10 minutes
# make gpu-check whether a GPU is right, and how fast: a table and a JSON file in some minutes
# make table     every class of CIFAR-10 in turn against the nine others: hours; goes on where it stopped
# make peers RUNS="DIR DIR"   PyOD's and anomalib's methods on the pictures of these runs: docs/real-defects.md
# make cifar10   the three scripts with their defaults, on CIFAR-10
# make lint      ruff

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
DEMO := outputs/digits-1
# for figures from CIFAR-10: make bench BENCH_RUN=outputs/cifar10-automobile BENCH_DATA="--dataset cifar10"
BENCH_RUN := outputs/digits-1-64
BENCH_DATA := --dataset digits

# of magnetic-tile: the folder that holds magnetic_tile.tar.xz
REAL ?=
# for the JPEG copy: make table TABLE="--dataset data/cifar10-jpeg --seeds 0 1 2"
TABLE :=
# for three seeds: make peers RUNS=outputs/elpv-mono-good PEERS_FLAGS="--seeds 0 1 2"
PEERS_FLAGS :=

IS_NEW_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'

.PHONY: demo washers washers-grey archive magnetic-tile elpv test browser bench gpu-check table peers cifar10 lint clean

demo: $(VENV)/installed
	$(BIN)/python train_gan.py --dataset digits --normal-class 1 --run-dir $(DEMO) \
	    --ngf 16 --ndf 16 --batch-size 16 --epochs 105 --generator-steps 3
	$(BIN)/python fit_latent.py --run-dir $(DEMO)
	$(BIN)/python evaluate.py --run-dir $(DEMO) --alpha 0.1
	@echo
	@echo "Look at:"
	@echo "  $(DEMO)/report.html            all of it in a browser, every image with its score"
	@echo "  $(DEMO)/samples.png            real digits next to generated ones"
	@echo "  $(DEMO)/difference_maps.png    where each test image differs from what G can draw"
	@echo "  $(DEMO)/score_histograms.png   how far normal and anomalous scores lie apart"
	@echo "  $(DEMO)/ranking.png            the most normal and the most anomalous images"
	@echo "  $(DEMO)/scores.csv             a row an image: scores, p_value, flagged"
	@echo "To run the scripts yourself: source $(BIN)/activate"

washers washers-grey: $(VENV)/installed
	test -d data/$@ || $(BIN)/python -m examples.planted_defects $(if $(findstring grey,$@),--grey)
	$(BIN)/python train_gan.py --dataset data/$@ --normal-class good --run-dir outputs/$@-good \
	    --picture-size own --batch-size 16 --epochs 15 --generator-steps 3
	$(BIN)/python fit_latent.py --run-dir outputs/$@-good --steps 50
	$(BIN)/python evaluate.py --run-dir outputs/$@-good --score peak
	$(BIN)/python fit_latent.py --run-dir outputs/$@-good --steps 50 --images data/$@/new
	$(BIN)/python evaluate.py --run-dir outputs/$@-good --images data/$@/new

# before anything is installed
archive:
	@test -d data/magnetic_tile || test -f "$(REAL)/magnetic_tile.tar.xz" || \
	    { echo "error: there is no $(or $(REAL),DIR)/magnetic_tile.tar.xz: make magnetic-tile REAL=DIR"; exit 1; }

# The GAN is not used for the scores of CutPaste and PCA: a small one, and one epoch, are enough
magnetic-tile: archive $(VENV)/installed
	test -d data/magnetic_tile || $(BIN)/python -m examples.magnetic_tile --archive "$(REAL)/magnetic_tile.tar.xz"
	$(BIN)/python train_gan.py --dataset data/magnetic_tile --normal-class good --run-dir outputs/magnetic-tile-good \
	    --group-by 'tile(\d+)' --picture-size 128 --image-size 64 --ngf 8 --epochs 1
	$(BIN)/python -m detectors.cutpaste --run-dir outputs/magnetic-tile-good
	$(BIN)/python evaluate.py --run-dir outputs/magnetic-tile-good

elpv: $(VENV)/installed
	test -d data/elpv-mono || { $(BIN)/pip install --quiet elpv-dataset && $(BIN)/python -m examples.elpv; }
	$(BIN)/python train_gan.py --dataset data/elpv-mono --normal-class good --run-dir outputs/elpv-mono-good \
	    --image-size 64 --ngf 8 --epochs 1
	$(BIN)/python -m detectors.pca --run-dir outputs/elpv-mono-good
	$(BIN)/python evaluate.py --run-dir outputs/elpv-mono-good

test: $(VENV)/installed-dev browser
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# For the tests of report.html, which are skipped without one
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
	    then apt-get update -qq && apt-get install -y -qq chromium >/dev/null; \
	    else echo "no Chromium here: install it, or the tests of report.html are skipped"; fi

bench: $(VENV)/installed $(BENCH_RUN)/gan.pt
	$(BIN)/python -m benchmarks.latent_search --run-dir $(BENCH_RUN)
	$(BIN)/python -m benchmarks.training $(BENCH_DATA)

gpu-check: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu_check

outputs/digits-1-64/gan.pt: | $(VENV)/installed
	$(BIN)/python train_gan.py --dataset digits --run-dir $(@D) \
	    --image-size 64 --ngf 64 --ndf 64 --batch-size 16 --epochs 30 --generator-steps 3

table: $(VENV)/installed
	$(BIN)/python -m benchmarks.cifar10_table $(TABLE)

peers: $(PEERS)/installed
	$(PEERS)/bin/python -m benchmarks.peers $(RUNS) $(PEERS_FLAGS)

cifar10: $(VENV)/installed
	$(BIN)/python train_gan.py
	$(BIN)/python fit_latent.py --run-dir outputs/cifar10-automobile
	$(BIN)/python evaluate.py --run-dir outputs/cifar10-automobile

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: requirements.txt
	@$(IS_NEW_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed Makefile
	$(BIN)/pip install "pytest>=8.4" "pytest-xdist>=3.6" "ruff>=0.17" "playwright>=1.50" "tensorboard>=2.18" \
	    "nbclient>=0.10" "ipykernel>=6.29" "pydicom>=3.0" "tifffile>=2024.8"
	touch $@

# Apart from the other: neither library is needed for anything else, and each brings many more
$(PEERS)/installed: requirements.txt Makefile
	@$(IS_NEW_PYTHON)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -r requirements.txt "pyod>=3.6.7" "anomalib>=2.7"
	touch $@

clean:
	rm -rf $(VENV) $(PEERS)
