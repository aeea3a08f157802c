# %% [markdown]
# # A first batch norm
#
# Six numbers, one layer, one deep network, one fair comparison. Everything here runs in a minute on a laptop; the
# longer story is in the documentation under *Learn*.

# %%
import torch
from torch import nn

import steadynorm as sn

# %% [markdown]
# ## Six numbers
#
# A mini-batch of one feature: 3, 5, 8, 9, 11, 24. Batch norm subtracts the mean and divides by the standard
# deviation. Every digit below is right.

# %%
sn.explain([3, 5, 8, 9, 11, 24])

# %% [markdown]
# Two variances appear: the *biased* one, 46, divided by n, normalises this batch; the *unbiased* one, 55.2, divided
# by n - 1, is what the layer remembers for later. The layer itself does the same:

# %%
batch = torch.tensor([[3.0], [5.0], [8.0], [9.0], [11.0], [24.0]])
layer = sn.BatchNorm1d(1)
layer(batch).detach().flatten()

# %%
layer.running_mean, layer.running_var  # 0.9 * 0 + 0.1 * 10   and   0.9 * 1 + 0.1 * 55.2

# %% [markdown]
# ## Training against inference
#
# In training the answer for 24 depends on who else is in the batch. In inference it must not, so the layer takes what
# it remembers.

# %%
one, company, other_company = batch[5:], batch, torch.cat([batch[5:], 100 + batch])
with torch.no_grad():
    print("training, among the six:     ", round(layer(company)[5].item(), 3))
    print("training, among larger ones: ", round(layer(other_company)[0].item(), 3))
    layer.eval()
    print("inference, among the six:    ", round(layer(company)[5].item(), 3))
    print("inference, alone:            ", round(layer(one)[0].item(), 3))

# %% [markdown]
# ## Why it is there: signals and gradients in a deep network
#
# Thirty layers of width 100 with the ELU activation, untrained. Three versions: torch's default initialization, He
# initialization with the gain that belongs to ELU, and batch norm before each activation. First, how strong is the
# signal on its way up; then, how strong is the gradient on its way down?


# %%
def deep(version: str, depth: int = 30, width: int = 100) -> nn.Sequential:
    """An ELU network in one of three versions."""
    blocks = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        if version != "default":
            sn.init.he_normal_(linear.weight, "elu")
            nn.init.zeros_(linear.bias)
        norm = [sn.BatchNorm1d(width)] if version == "batch norm" else []
        blocks.append(nn.Sequential(linear, *norm, nn.ELU()))
    return nn.Sequential(*blocks)


def strengths(version: str) -> tuple[list[float], list[float]]:
    """The root mean square of each block's output, and of the loss's gradient there."""
    torch.manual_seed(0)
    network, signal = deep(version), torch.randn(256, 100)
    outputs = []
    for block in network:
        signal = block(signal)
        signal.retain_grad()
        outputs.append(signal)
    (outputs[-1] * torch.randn(256, 100)).mean().backward()
    return [x.detach().square().mean().sqrt().item() for x in outputs], [
        x.grad.square().mean().sqrt().item() for x in outputs
    ]


print(f"{'':24}{'signal after layer':^33}{'gradient at layer':^33}")
print(f"{'':24}" + 2 * "".join(f"{n:>11}" for n in (1, 15, 30)))
for version in ("default", "he", "batch norm"):
    signal, gradient = strengths(version)
    print(
        f"{version:24}"
        + "".join(f"{x:11.1e}" for values in (signal, gradient) for x in (values[0], values[14], values[29]))
    )

# %% [markdown]
# With the default the signal fades on its way up (what is left of it are the biases), and the gradient fades on its
# way back, by seven decades: the first layers learn nothing. A matching initialization mends that *at the start*.
# Batch norm mends it at every step, whatever the weights become: scale them all by 10 and look again.

# %%
for version in ("he", "batch norm"):
    torch.manual_seed(0)
    network = deep(version)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.weight *= 10
        largest = network(torch.randn(256, 100)).abs().max().item()
    print(f"{version:12} largest output after 30 layers: {largest:.2g}")

# %% [markdown]
# ## Does it help?
#
# The same network with and without batch norm on scikit-learn's digits: the sigmoid network of the 2015 paper. Each
# version gets the same search for its learning rate *and* its initialization, so that neither is handicapped; what is
# shown is measured on fresh seeds. This is a toy run of two seeds and 200 steps: the intervals are wide, and after 200
# steps the plain network has not finished learning. `steadynorm compare` in a terminal makes the full comparison.

# %%
sn.compare(seeds=2, tuning_seeds=1, steps=200, studies=("gradients",), jobs=1, progress=False)

# %% [markdown]
# ## When not to
#
# Statistics of a tiny batch are mostly noise. The same example, normalised in a hundred different batches:

# %%
torch.manual_seed(0)
for size in (2, 4, 16, 64, 256):
    example = torch.ones(1, 1)
    layer = sn.BatchNorm1d(1)
    with torch.no_grad():
        outputs = torch.stack([layer(torch.cat([example, torch.randn(size - 1, 1)]))[0] for _ in range(100)])
    print(f"batch of {size:3}: output {outputs.mean().item():.2f} ± {outputs.std().item():.2f}")

# %% [markdown]
# With batches this small take a normalisation that needs no batch (GroupNorm, LayerNorm), or correct each batch
# towards the running statistics (batch renormalization). *When not to use batch norm* in the documentation has the
# list.
