import torch.nn.functional as F
from torch import nn

import steadynorm as sn
from steadynorm.experiment.arms import BEFORE, PLAIN


class Plain(nn.Module):
    """Twenty hidden layers, called in a loop, with a function for a nonlinearity."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(64 if first else 100, 100) for first in (True, *[False] * 19))
        self.out = nn.Linear(100, 10)

    def forward(self, x):
        x = x.flatten(1)
        for layer in self.hidden:
            x = F.elu(layer(x))
        return self.out(x)


def test_the_gain_of_a_plain_network_of_twenty_layers_is_in_the_report():
    found = sn.compare(
        *("digits", Plain), arms=(PLAIN, BEFORE), seeds=3, tuning_seeds=1, steps=15, studies=(), jobs=1, progress=False
    )
    plain, before = found.results["summaries"]
    assert before["test_accuracy"] > plain["test_accuracy"] + 0.1
    claim = next(claim for claim in found.results["claims"] if claim["claim"].startswith("Better accuracy"))
    assert claim["verdict"] == "supported"
    parameters = [arm["parameters"] for arm in found.results["arms"]]
    assert parameters[1] - parameters[0] == 20 * 100  # γ and β for each bias
