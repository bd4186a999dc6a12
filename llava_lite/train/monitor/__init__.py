"""What a run reports: metrics, evaluation, plots, and the errors that stop it."""
