"""Real data: loaders of the field's formats, and random-access, seeded sequences of batches."""
