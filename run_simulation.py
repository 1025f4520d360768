"""The same as ``fedsim run``: ``python run_simulation.py [CONFIG.toml] [--key value ...]``."""

import sys

from fedsim.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
