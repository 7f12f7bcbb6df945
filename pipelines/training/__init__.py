"""The training engine: options, plan, launch, loop, checkpoints, a run's folder."""
