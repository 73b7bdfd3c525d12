"""``python -m benchmarks.kernels``: the same as ``pyquant bench kernels``, see pyquant.bench.kernels."""

from pyquant.bench.cli import main_kernels

if __name__ == "__main__":
    main_kernels()
