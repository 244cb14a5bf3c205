"""The collapse monitor says in one sentence what a row of metrics shows."""

import pytest

from fastcl.progress import collapse_sentence, collapse_signs

WELL = {
    "loss": 5.0, "loss_if_collapsed": 6.0, "feature_std": 0.12, "feature_std_even": 0.125,
    "effective_rank": 40.0, "effective_rank_most": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"loss": 6.01}, ["the loss sits at 6.000"]),
        ({"feature_std": 0.01}, ["standard deviation of 1.0e-02 (1.2e-01 when"]),
        ({"effective_rank": 1.4}, ["effective rank of 1.40 of 64"]),
        (
            {"loss": 6.0, "feature_std": 0.0, "effective_rank": 1.0},
            ["the loss sits at", "they hardly differ", "they fill few directions"],
        ),
        ({"loss_if_collapsed": None, "loss": 6.0}, []),
    ],
)
def test_collapse_in_one_plain_sentence(changed, said):
    row = WELL | changed
    signs = collapse_signs(row)
    assert len(signs) == len(said)
    assert all(part in sign for part, sign in zip(said, signs))
    sentence = collapse_sentence(row)
    assert sentence.endswith(".") and "\n" not in sentence
    assert ("have collapsed" in sentence, "have not collapsed" in sentence) == (
        bool(said),
        not said,
    )
    assert all(part in sentence for part in said)


def test_nothing_is_said_of_no_steps():
    assert "Nothing can be said" in collapse_sentence({})
    assert "Nothing can be said" in collapse_sentence(WELL | {"loss": None})
