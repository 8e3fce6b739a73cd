"""`clip-deploy serve` with a fault that a load test must find: python -m tests.support.broken_server FAULT serve ..."""

import sys
from itertools import count

from clip_deploy.__main__ import main
from clip_deploy.web.batcher import Batcher

encoded, settle = Batcher._encoded, Batcher._settle
batches = count(1)
EVERY = 20  # of so many batches one answer is dropped


def swap(batcher, values):
    """Two answers of a batch change places."""
    answers = list(encoded(batcher, values))
    return [*answers[1::-1], *answers[2:]]


def one_for_all(batcher, values):
    """What a server for CLIP did under load, with status 200."""
    answers = encoded(batcher, values)
    return [answers[0]] * len(answers)


def drop(batcher, rows, answers):
    if next(batches) % EVERY:
        settle(batcher, rows, answers)
    else:
        settle(batcher, rows[1:], answers[1:])


FAULTS = {"swap": ("_encoded", swap), "one for all": ("_encoded", one_for_all), "drop": ("_settle", drop)}

if __name__ == "__main__":
    setattr(Batcher, *FAULTS[sys.argv[1]])
    sys.exit(main(sys.argv[2:]))
