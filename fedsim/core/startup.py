"""Keeping a process from importing what it does not need."""

from __future__ import annotations

import torch


def leave_compiler_out() -> None:
    """Let this process make optimisers without torch's compiler.

    torch imports its compiler (900 modules, 1.3 s of a processor) when the first optimiser is made,
    only to have the compiler leave that call alone. Every process that compiles nothing can take
    the call as it is: nothing that is computed changes. A version of torch that does this in
    another way is left as it is.
    """
    for name in ("add_param_group", "zero_grad"):
        method = getattr(torch.optim.Optimizer, name)
        if wrapped := getattr(method, "__wrapped__", None):
            # Where torch keeps the method once the compiler has taken note.
            wrapped.__dict__.setdefault("__dynamo_disable", wrapped)
