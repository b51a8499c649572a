"""What a model costs, computed from its configuration before anything is loaded."""
