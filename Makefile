# make demo: set everything up and run the main job on the demo data.   make test, make test-all: the tests, short and all.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
PYTEST = $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 40
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
# The defaults, but for a detector, images and a length that two CPU cores can bear; a GPU runs the same.
SMALL := --data data/demo --rois-per-image 32 --proposals 128 --num-workers 1

.PHONY: demo test test-all pictures check setup clean-demo

setup: .venv/.done

.venv/.done: requirements.txt requirements-dev.txt constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt -e .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps trackio gradio_client supervision -c constraints.txt
	touch $@

# Each step goes on where an interrupted one stopped; what is finished is not done again.
demo: setup
	$(BIN)/python scripts/make_demo_data.py --output-dir data/demo --image-size 128
	$(LAUNCH) scripts/pretrain.py $(SMALL) --model faster_rcnn_r50_fpn --backbone resnet18 --channels 128 \
	    --image-size 128 --max-steps 1200 --eval-every 6 --output-dir $(RUN)/pretrain --resume
	$(LAUNCH) scripts/finetune.py $(SMALL) --init $(RUN)/pretrain --short-side 192 --long-side 192 \
	    --micro-batch-size 16 --max-steps 150 --eval-every 2 --output-dir $(RUN) --resume
	$(LAUNCH) scripts/evaluate.py --checkpoint $(RUN) --data data/demo --num-workers 1
	mkdir -p $(RUN)/samples && cp data/demo/images/val_00000*.jpg $(RUN)/samples/
	$(BIN)/python scripts/predict.py --checkpoint $(RUN) $(RUN)/samples --output-dir $(RUN)/pictures
	@echo "metrics: $(RUN)/metrics.json   report: $(RUN)/report.html   curves: $(RUN)/curves.png   pictures: $(RUN)/pictures"

# The figures of the README, out of the demo's run.
pictures: demo
	mkdir -p docs/images
	$(BIN)/python -c "from pathlib import Path; from PIL import Image; from direct_pt.images.visualize import contact_sheet; \
	    paths = sorted(Path('$(RUN)/pictures').glob('*.jpg'))[:6]; \
	    images = [Image.open(path).resize((208, 208), Image.Resampling.LANCZOS) for path in paths]; \
	    contact_sheet(images, [path.name for path in paths], 208, columns=3).save('docs/images/detections.jpg', quality=85); \
	    Image.open('$(RUN)/pretrain/curves.png').convert('P').save('docs/images/curves.png', optimize=True)"
	$(BIN)/python -c "from playwright.sync_api import sync_playwright; from pathlib import Path; from shutil import which; \
	    from PIL import Image; driver = sync_playwright().start(); \
	    browser = driver.chromium.launch(executable_path=which('chromium'), args=['--no-sandbox']); \
	    page = browser.new_page(viewport={'width': 1200, 'height': 860}); \
	    page.goto(Path('$(RUN)/report.html').absolute().as_uri()); page.screenshot(path='docs/images/report.png'); \
	    Image.open('docs/images/report.png').convert('P').save('docs/images/report.png', optimize=True); \
	    browser.close(); driver.stop()"

# What a contributor runs before each commit; test-all adds launchers, DeepSpeed, two hosts, faults, fuzz, benchmarks.
test: setup
	$(PYTEST) -m "not slow"

test-all: test
	$(PYTEST) -m slow

check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean-demo:
	rm -rf $(RUN) data/demo
