"""The web page at `/`: plain files that ship with the package and load nothing from anywhere else."""
