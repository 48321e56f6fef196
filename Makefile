# Every figure in docs/, made anew; each benchmark names its machine. Nothing else should be running.
PYTHON ?= python
DATA ?= cifar10-jpeg
WEIGHTS ?= ../shared/weights

.PHONY: bench
bench:
	$(PYTHON) benchmarks/startup.py
	$(PYTHON) benchmarks/layers.py
	$(PYTHON) benchmarks/layers.py --rates
	$(PYTHON) benchmarks/networks.py
	$(PYTHON) benchmarks/distortion.py --step --weights $(WEIGHTS)/resnet32-cifar10.safetensors
	$(PYTHON) benchmarks/training.py

# These train, for an hour or more.
.PHONY: bench-training
bench-training:
	$(PYTHON) benchmarks/distortion.py --record vgg19_bn --data $(DATA)
	$(PYTHON) benchmarks/tiles.py --weights $(WEIGHTS)/resnet32-cifar10.safetensors --vgg runs/trajectories/vgg19_bn
	$(PYTHON) benchmarks/factors.py --data $(DATA) --weights $(WEIGHTS)/resnet32-cifar10.safetensors --out results/factors/tucker-4x.jsonl
	$(PYTHON) examples/compress_resnet32.py --data $(DATA) --weights $(WEIGHTS)/resnet32-cifar10.safetensors
