"""Draw the curves of the newest run in ./model/runs: the picture in the README.

reads   what TensorBoard reads, so a run with tensorboard installed
writes  the picture
run     pip install matplotlib tensorboard && python tests/curves.py curves.svg
"""

import os
import sys

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

runs_path = "./model/runs"
panels = {
    "loss": ("epoch/train_loss", "epoch/dev_loss"),
    "dev, at 0.5": ("epoch/accuracy", "epoch/micro_f1", "epoch/macro_f1"),
    "learning rate": ("train/lr",),
}


def main():
    """Draw the panels side by side."""
    events = EventAccumulator(
        os.path.join(runs_path, max(os.listdir(runs_path))), {"scalars": 0}
    ).Reload()
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "curves"})
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 2.8), layout="constrained")
    for axis, (title, names) in zip(axes, panels.items()):
        for name in names:
            points = [(event.step, event.value) for event in events.Scalars(name)]
            axis.plot(*zip(*points), label=name, marker="." if name.startswith("epoch/") else None)
        axis.set(title=title, xlabel="batches")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(sys.argv[1], metadata={"Date": None} if sys.argv[1].endswith(".svg") else None)


if __name__ == "__main__":
    main()
