"""One training step: how it is built, differentiated, compiled into segments, and held to its word."""
