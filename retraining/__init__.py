"""Stage 2: classifiers re-trained on the features of one frozen backbone, many at once."""

from retraining.solver import LinearHeads

__all__ = ["LinearHeads"]
