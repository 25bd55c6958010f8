"""What is measured of a classifier beyond its accuracy."""

from __future__ import annotations

from dataclasses import dataclass

from retraining.results import ClassifierResult, FrozenBackbone
from utils.metrics import Report, calibration_error, fit_temperature, logit_statistics, report


@dataclass(frozen=True)
class Measures:
    """What was measured of one classifier on the test images: figures, and values (C,) of every class."""

    report: Report
    per_class: dict[str, list[float | None]]
    temperature: float | None
    ece_calibrated: float | None

    @property
    def profile(self) -> dict[str, list[float | None]]:
        """What :func:`utils.plots.class_profiles` draws."""
        return {"per_class": self.report["per_class"], **self.per_class}

    def line(self, result: ClassifierResult) -> dict[str, object]:
        """Everything that is known of the classifier, for results.jsonl."""
        selection = result.selection
        return {
            "method": result.setting.method,
            **result.setting.values,
            "epoch": selection.epoch,
            "select": selection.rule,
            "seconds": result.seconds,
            **self.report,
            **self.per_class,
            "temperature": self.temperature,
            "ece_calibrated": self.ece_calibrated,
        }


def measure(result: ClassifierResult, frozen: FrozenBackbone) -> Measures:
    """The whole test report, with per-class Logits Magnitude, RSD and weight norms (without flip averaging)."""
    labels = frozen.data.test.labels
    logits = frozen.logits_of(result, "test")
    per_class = logit_statistics(frozen.logits_of(result, "test", flip=False), labels)
    per_class["weight_norm"] = result.classifier.get_parameter("weight").norm(dim=1).tolist()
    temperature = calibrated = None
    if frozen.data.val is not None:
        temperature = fit_temperature(frozen.logits_of(result, "val"), frozen.data.val.labels)
        calibrated = calibration_error(logits, labels, temperature)
    return Measures(report(logits, labels, frozen.data.class_counts), per_class, temperature, calibrated)
