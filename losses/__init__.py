"""Losses: one family per file. ``LOSSES`` maps a name to a class; an instance maps (logits, labels) to a scalar."""

from losses.label_smoothing import LabelSmoothing, auto_label_smooth

LOSSES = {"ce": LabelSmoothing}

__all__ = ["LOSSES", "LabelSmoothing", "auto_label_smooth"]
