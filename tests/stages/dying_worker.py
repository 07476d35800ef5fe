"""A training process whose second rank is killed once it has made three updates."""

import os
import signal

from pipeline import training_run
from training import loop
from training.launch import work

_step = loop.Trainer._train_step


def train_step(self, step):
    report = _step(self, step)
    if report.step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return report


if __name__ == "__main__":
    loop.Trainer._train_step = train_step
    work(training_run._do)
