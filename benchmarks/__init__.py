"""What training in FP4 costs: `python -m halfbyte.bench`."""
