"""Benchmarks: pyquant's kernels against bitsandbytes, dense products and other 4-bit kernels, in one run."""
