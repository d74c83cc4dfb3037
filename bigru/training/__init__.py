"""Training the forecaster: the loop, its checkpoints, several processes, and the folder that a run leaves."""
