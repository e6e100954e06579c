"""torchvision, where it is installed, beside the CPU build of torch.

Its compiled operators can't be loaded there. transformers and open_clip import it all the same, so
the operators that it speaks of while it is imported are named first; nothing here calls them.
"""

import importlib.util
import sys
import types

import torch

if importlib.util.find_spec("torchvision") is not None and not torch.cuda.is_available():
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("_meta_registrations")
