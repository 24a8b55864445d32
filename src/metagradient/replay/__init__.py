"""Replay: when to keep a state of a training run, where, and how to rebuild the others."""
