"""What torch does, for which it is patched: fails where the patch can go."""

import subprocess
import sys

PROGRAM = """
import sys
import torch
from fedsim.core.startup import leave_compiler_out

if sys.argv[1] == "patched":
    leave_compiler_out()
parameter = torch.nn.Parameter(torch.ones(3))
for make in (torch.optim.SGD, torch.optim.Adam):
    optimizer = make([parameter], lr=0.5)
    parameter.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
print("torch._dynamo" in sys.modules, parameter.tolist())
"""


def made(how):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
    )
    return done.stdout.split(maxsplit=1)


def test_torch_imports_its_compiler_for_optimizers_that_are_not_compiled():
    (imported, plain), (imported_as_well, patched) = made("plain"), made("patched")
    assert (imported, imported_as_well) == ("True", "False")
    assert plain == patched
