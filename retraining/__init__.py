"""Stage 2: classifiers re-trained on the features of one frozen backbone, many at once."""
