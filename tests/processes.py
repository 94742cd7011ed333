# SPDX-License-Identifier: MIT
"""One process of test_distributed.py: ``python tests/processes.py RANK STORE RESULT`` stores what cases returned."""

import sys

import torch
from torch import distributed

from process_cases import SPREAD, WHOLE
from process_errors import ERRORS, GROUPS
from process_nets import WORLD
from process_pieces import PIECES


def main(rank, store, path):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    found = {}
    for name, case in (WHOLE | SPREAD | PIECES | GROUPS).items():
        found[name] = case()
    for name, case in ERRORS.items():
        try:
            found[name] = case()
        except (RuntimeError, TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    torch.save(found, path)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
