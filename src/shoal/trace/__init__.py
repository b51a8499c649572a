"""What the experts did: recorded while a model runs, kept in files, summed up and drawn."""
