"""Making a model yours: supervised tuning, adapters under a parameter budget, distillation, another shape. Needs the `train` extra."""
