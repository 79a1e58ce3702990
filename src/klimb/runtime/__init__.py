"""What carries a run: its directory, its checkpoints, its learner, its way out on Ctrl-C."""
