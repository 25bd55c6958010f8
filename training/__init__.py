"""Stage 1: what the training of a backbone is made of."""
