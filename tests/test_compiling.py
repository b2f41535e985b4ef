"""torch.compile of a graph with operators of our own, whatever torch is there."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from torch._inductor import exc
from torch.torch_version import TorchVersion

from kernels.compiling import compiled


class Deep:
    def __str__(self):
        raise AssertionError("an argument was written out")

    __repr__ = __str__


def test_older_torch_writes_out_no_arguments(monkeypatch):
    as_it_was = staticmethod(exc.OperatorIssue.operator_str)
    monkeypatch.setattr(exc.OperatorIssue, "operator_str", as_it_was)  # so that it is put back
    with pytest.raises(AssertionError, match="written out"):
        exc.MissingOperatorWithoutDecomp("mlp", [Deep()], {})
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    compiled(lambda x: x, whole=True)
    assert "mlp of 1 arguments" in str(exc.MissingOperatorWithoutDecomp("mlp", [Deep()], {}))


def test_newer_torch_is_left_as_it_is(monkeypatch):
    before = exc.OperatorIssue.operator_str
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0+cpu"))
    compiled(lambda x: x, whole=True)
    assert exc.OperatorIssue.operator_str is before
