"""The losses with gradients derived by hand, for speed and memory.

Each has the meaning of the plain composition in :mod:`care_loss.functional`, which it is given and
which computes whatever it does not: second derivatives, forward mode, `torch.func`.
"""
