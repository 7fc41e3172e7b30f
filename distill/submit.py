"""`python -m distill.submit recipe=NAME cluster=NAME`: queues a run as a job of Slurm, or a sweep (-m) as an array of jobs."""

from __future__ import annotations

import sys

from distill import terminal

HELP = """distill.submit: queue a run as a job of Slurm.

  cluster=NAME        what the job asks for: configs/cluster, or --config-dir FOLDER with FOLDER/cluster/NAME.yaml; required
  cluster.KEY=VALUE   as in cluster.nodes=2 cluster.time=12:00:00
  dry=true            print the script, queue nothing
  -m                  a sweep is one array of jobs, with a run folder for each element
  everything else     as for distill.train, which the job runs

The run is composed and checked before it is queued. A warning of Slurm (USR1, USR2) or SIGTERM saves a checkpoint, and the job
is queued again.

Examples:
  python -m distill.submit recipe=sid cluster=slurm cluster.nodes=2 cluster.gpus_per_node=4 cluster.time=12:00:00
  python -m distill.submit recipe=sid cluster=slurm -m seed=0,1,2
  sbatch --dependency=afterok:JOB --gpus=1 slurm/afterwards.sbatch model=runs/sid/export reference=digits"""


def main() -> None:
    """Compose, check, queue. Wrong input exits with one message, before anything is queued."""
    if terminal.asked_for_help(HELP):
        return
    from distill.cluster.submit import submit
    from distill.recipe.arguments import arguments, check_choice
    from distill.recipe.compose import CONFIGS, explain
    from distill.recipe.sources import register_sources

    with terminal.report_errors(explain):
        register_sources()
        given = arguments(sys.argv[1:])
        for argument in given:
            check_choice(argument, CONFIGS)
        print(terminal.printable(submit(given)), end="")


if __name__ == "__main__":
    main()
