"""What the commands share: options, data, checkpoints to networks, records, sweeps."""
