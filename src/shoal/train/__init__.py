"""Training: recipes, the loop, optimisers, router balance, checkpoints. Needs the `train` extra."""
