"""SLURM: its commands, the script of a job, and what a run directory remembers of its jobs."""
