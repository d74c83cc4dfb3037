"""Training the forecaster: the loop, its checkpoints, several processes, and the folder that a run leaves."""

from bigru.command import require_forecaster

require_forecaster(__name__)
