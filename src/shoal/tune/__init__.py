"""Making a model yours: supervised tuning, adapters under a budget, distillation, another shape. Needs `train`."""
