"""Making a model yours: supervised tuning, adapters under a parameter budget, distillation. Needs the `train` extra."""
