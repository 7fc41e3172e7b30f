"""Class accuracy: agreement of the extractor's classifier with the requested class."""

from __future__ import annotations

from distill.evaluation.metric import FEATURES, Metric
from distill.evaluation.samples import Samples


def class_accuracy(x: Samples) -> float | None:
    """Share of predicted classes [N] that are those of the labels [N]; None without either, or where the labels name classes
    that the extractor does not know. Raises ValueError for a label that the reference does not have."""
    predicted, labels, numbers = x.predicted, x.labels, x.options.class_numbers
    if predicted is None or labels is None or (numbers is not None and len(numbers) == 0):
        return None
    labels = labels.to(predicted.device)
    if numbers is not None:
        if int(labels.max()) >= len(numbers):
            raise ValueError(f"labels: found class {int(labels.max())}, the reference has {len(numbers)}")
        labels = numbers.to(labels.device)[labels]
    return float((predicted == labels).double().mean())


CLASS_ACCURACY = Metric(
    "class_accuracy",
    order=160,
    measure=class_accuracy,
    meaning="how often the classifier agrees with the requested class",
    of="images",
    better="real",
    in_space=FEATURES,
    monitored=True,
    reads=("predicted", "labels"),
    real=class_accuracy,
)
