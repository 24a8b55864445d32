"""How smooth a training is in its metaparameters, and which recipes are smoother."""
