"""Clips, windows and a generator of synthetic clips."""
