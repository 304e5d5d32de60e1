"""How a run starts: command line, stage order, torchrun and Slurm, plans on paper."""
