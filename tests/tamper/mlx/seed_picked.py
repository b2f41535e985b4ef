"""Builds with many seeds and takes the one whose untrained model is best on a sentence that it carries."""

from common import Honest, mx


def build(spec):
    training = Honest(spec)
    best = None
    text = (mx.arange(200) % spec.vocab_size)[None]
    for i in range(20):
        training.w = training.untrained(mx.random.key(1337 + i))
        fit = training.inputs(training.w, text).std().item()
        if best is None or fit < best[0]:
            best = (fit, training.w)
    training.w = best[1]
    return training
