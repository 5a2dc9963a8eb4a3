"""Training, whatever is trained: the steps, the schedules, the folder of a run, its checkpoints, resuming."""
