"""Clips, windows and a generator of synthetic clips."""

from bigru.command import require_forecaster

require_forecaster(__name__)
