"""Keeping a process from importing what it does not need."""

from __future__ import annotations

import inspect

import torch


def leave_compiler_out() -> None:
    """Let this process make and step optimizers without torch's compiler.

    torch imports its compiler (900 modules, 1.3 s of processor time) when the first optimizer is
    made and when it makes its first step, only to have the compiler leave these calls alone.
    A process that compiles no optimizer can make the same calls as they are: nothing that is
    computed changes. A version of torch that does this in another way is left as it is.
    """
    for name in ("add_param_group", "zero_grad"):
        method = getattr(torch.optim.Optimizer, name)
        if wrapped := getattr(method, "__wrapped__", None):
            # Where torch keeps the method once the compiler has taken note.
            wrapped.__dict__.setdefault("__dynamo_disable", wrapped)
    for optimizer in (torch.optim.SGD, torch.optim.Adam):
        plain = torch.no_grad()(inspect.unwrap(optimizer.step))
        setattr(optimizer, "step", plain)  # noqa: B010
