"""Speed: what commands cost, in time and memory, beside their floors. Results in `benchmarks/results/`."""
