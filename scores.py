"""Scores, each a small function from images and what the networks make of them to one number an image.

High means anomalous, for every score. The paper's own stand in util.py, where the search minimises them.
"""

import torch


def turned(x: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, H) as they are, then all of them turned by 90, by 180 and by 270 degrees: (4 N, C, H, H)."""
    return torch.cat([x.rot90(turn, (2, 3)) for turn in range(4)]).contiguous(memory_format=torch.channels_last)
