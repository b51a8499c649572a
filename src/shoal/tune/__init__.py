"""Make a model yours: tune it, distil it, give it another shape."""
