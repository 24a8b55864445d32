"""Metagradient descent: the loop over meta-steps, and the updates that it takes."""
