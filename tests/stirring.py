"""Networks that are not new ones any more, for tests of several programs."""

from torch import nn

from odconv.layers import Attention


def stirred(model):
    """The model with attentions that differ from sample to sample, and batch norms that change what they meet."""
    for module in model.modules():
        if isinstance(module, Attention):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.3)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model
