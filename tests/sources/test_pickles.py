"""A pickle gives uint8 arrays and nothing else; nothing in it is executed."""

from __future__ import annotations

import gzip
import os
import pickle

import numpy as np
import pytest
from layouts import Part, noise, refusal, write_mnist

PARTS = noise()


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch evil",)


ONE = np.zeros((1, 2, 2, 3), np.uint8)
PICKLES: dict[str, tuple[bytes, str]] = {
    "code": (pickle.dumps({"train": Evil()}), "it calls posix.system"),
    "code in protocol 0": (pickle.dumps({"train": Evil()}, 0), "it calls posix.system"),
    "code beside arrays": (pickle.dumps({"train": ONE, "x": Evil()}), "it calls posix.system"),
    "eval": (b"\x80\x02cbuiltins\neval\n(U\x011tR.", "it calls builtins.eval"),
    "an attribute of what is allowed": (
        b"\x80\x04\x8c\x15numpy.core.multiarray\x8c\x18_reconstruct.__globals__\x93.",
        "it calls numpy.core.multiarray._reconstruct.__globals__",
    ),
    "numpy's own loader": (b"\x80\x02cnumpy\nload\n.", "it calls numpy.load"),
    "a class of ours": (pickle.dumps({"train": Part(images=ONE, labels=ONE)}), "it calls layouts.Part"),
    "a list": (pickle.dumps([1]), "expected images and labels"),
    "a number": (pickle.dumps({"train": 1}), "found no arrays"),
    "other keys": (
        pickle.dumps({"a": ONE, "train": ONE}),
        "no labels; accepted without labels are train, val and test",
    ),
    "objects": (pickle.dumps({"train": np.array([None])}), "an array of 'O8'"),
    "floats": (pickle.dumps({"train": np.full((40, 28, 28, 3), 7.0)}), "floats from 7.0 to 7.0"),
    "another shape": (pickle.dumps({"train": np.zeros((40, 28, 28, 2), np.uint8)}), "uint8 of shape (40, 28, 28, 2)"),
    "too few": (pickle.dumps({"train": PARTS["train"].images[:9]}), "expected 9 whole numbers"),
    "cut short": (pickle.dumps({"train": PARTS["train"].images})[:-9], "not a pickled dict of arrays"),
    "text": (b"(this is no pickle", "not a pickled dict of arrays"),
    "an array without a state": (
        b"\x80\x02}U\x05traincnumpy.core.multiarray\n_reconstruct\n)\x81s.",
        "not a pickled dict of arrays",
    ),
    "a state for a constructor": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}U\x05arrayK\x01sb.",
        "not a pickled dict of arrays",
    ),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_of_anything_but_arrays_is_refused_and_not_run(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    data, part = PICKLES[case]
    mnist = str(write_mnist(tmp_path / "mnist", PARTS))
    for path, content in ((tmp_path / "set.pkl", data), (tmp_path / "set.pkl.gz", gzip.compress(data))):
        path.write_bytes(content)
        assert part in refusal(path, mnist=mnist)
    assert not (tmp_path / "evil").exists()
