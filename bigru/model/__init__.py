"""The forecaster, its metrics and its checkpoints."""
