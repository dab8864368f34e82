"""The losses of a run."""

from runs import metrics


def losses(directory):
    return [row["train_loss"] for row in metrics(directory) if "train_loss" in row]
