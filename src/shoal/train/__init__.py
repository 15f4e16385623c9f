"""Plan, fleet, objectives, optimizers, schedules, checkpoints."""
