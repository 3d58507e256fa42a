"""Studies of what models do, on data of the user's. Results in `experiments/results/`."""
