.PHONY: test test-gpu lint format bench cuda

test:
	pytest -n 2 --dist loadfile

test-gpu:
	pytest tests/gpu -m gpu

lint:
	ruff check .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs clang-format --dry-run -Werror
	mypy

format:
	ruff check --fix .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs clang-format -i

bench:
	pytest benchmarks --benchmark-only

cuda:
	FASTCNN_CUDA=1 pip install --no-build-isolation --no-deps --force-reinstall .
