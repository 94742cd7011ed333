# SPDX-License-Identifier: MIT
"""The cases of test_distributed.py in which gradients are cut into pieces, of which each process combines its own."""

from contextlib import nullcontext
from functools import partial
from unittest import mock

from torch import distributed

from gradsurgery import _exchange
from gradsurgery._survey import Survey
from inputs import DEVICE
from process_cases import WHOLE, train
from process_losses import EACH_ONE, lacking
from process_nets import alone


def small_messages(case=train):
    with mock.patch.object(_exchange, "_MESSAGE_BYTES", 100):
        return case()


def in_pieces(case=train, from_first=True):
    """Cut even small gradients; ``from_first``: even those of first steps, in which gradients are looked at whole."""
    whole = mock.patch.object(Survey, "wants_gradients", return_value=False) if from_first else nullcontext()
    with mock.patch.object(_exchange, "_PIECES_BYTES", 0), whole:
        return case()


def whole_for_one():
    """The first process alone looks at the gradients: all then average whole ones."""
    wants = mock.patch.object(Survey, "wants_gradients", side_effect=lambda _: distributed.get_rank() == 0)
    check = mock.patch.object(Survey, "check")
    with nullcontext() if alone() else wants, check, mock.patch.object(_exchange, "_PIECES_BYTES", 0):
        return train()


def reduced():
    """Use the operations that other backends than gloo are given."""
    with mock.patch.object(_exchange, "_backend", return_value="nccl"):
        return in_pieces()


PIECES = {
    **{f"pieces {name}": partial(in_pieces, case) for name, case in WHOLE.items()},
    "pieces again": partial(in_pieces, partial(lacking, EACH_ONE, "pcgrad", collected=True, again=True)),
    "pieces after the first step": partial(in_pieces, from_first=False),
    "small messages": small_messages,
    "pieces for all but one": whole_for_one,
    "small pieces": partial(in_pieces, small_messages),
}
if DEVICE == "cpu":
    PIECES["reduced pieces"] = reduced
