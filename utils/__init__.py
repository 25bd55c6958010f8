"""Options, checkpoints, metrics, run folders and plots: what every script needs and no model or data set knows."""
