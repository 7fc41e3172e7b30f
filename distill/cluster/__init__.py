"""Jobs of Slurm: what is asked for (`options`), their scripts (`script`), and how they are queued (`submit`)."""
