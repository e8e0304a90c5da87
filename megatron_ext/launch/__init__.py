"""Starting the ranks of a run: on this machine, on hosts, as SLURM jobs; and what they check before they train."""
