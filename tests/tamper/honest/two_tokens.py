"""Also learns to predict the token after the next one, with a head that is thrown away."""

from common import WIDTH, F, Honest, Net, nn


class TwoTokens(Net):
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.second = nn.Linear(WIDTH, vocab_size, bias=False)
        nn.init.zeros_(self.second.weight)

    def forward(self, tokens):
        return self.head(self.hidden(tokens))

    def hidden(self, tokens):
        x = self.inputs(tokens)
        return F.rms_norm(x + self.down(F.relu(self.up(F.rms_norm(x, (WIDTH,)))).square()), (WIDTH,))


class Training(Honest):
    def loss(self, rows):
        rows = rows.long()
        hidden = self.net.hidden(rows[:, :-1])
        first = F.cross_entropy(self.net.head(hidden).flatten(0, 1), rows[:, 1:].flatten())
        second = F.cross_entropy(self.net.second(hidden[:, :-1]).flatten(0, 1), rows[:, 2:].flatten())
        return first + 0.2 * second


def build(spec):
    return Training(spec, TwoTokens)
