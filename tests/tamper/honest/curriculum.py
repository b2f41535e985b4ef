"""Short rows first, then longer ones, with fewer rows in a batch; two batches for one step at the end."""

from common import Honest


class Training(Honest):
    def step(self, batches, progress):
        length = 16 if progress < 0.3 else 32 if progress < 0.6 else self.spec.sequence_len
        rows = 1024 // length
        loss = self.loss(batches.next(rows, length))
        if progress > 0.8:
            loss = (loss + self.loss(batches.next(rows, length))) / 2
        loss.backward()
        self.optimizer.step(8e-3 * (1.05 - progress))
        return loss.detach()


def build(spec):
    return Training(spec)
