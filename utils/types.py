"""Types that several modules share."""

from typing import Any

#: What PyTorch's ``state_dict`` gives and ``load_state_dict`` takes.
StateDict = dict[str, Any]
#: A JSON object that was read.
Json = dict[str, Any]
#: What was measured of one epoch, {name of metrics.jsonl: number}; None stands for "not measured".
Record = dict[str, float | None]


def epoch_of(record: Record) -> int:
    """The epoch (from 1) that a record is of."""
    return int(record["epoch"] or 0)
