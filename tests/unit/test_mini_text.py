"""The mini text encoder's tokens: known words have rows, all others share row 0."""

from __future__ import annotations

import torch

from anystory_core.mini.weights import full_table, pack_text, row_of_token


def test_rows_of_known_and_unknown_tokens() -> None:
    rows = row_of_token([5, 900, 49406, 49407])
    assert rows.shape == (49408,)
    assert rows[[5, 900, 49406, 49407]].tolist() == [1, 2, 3, 4]
    assert int((rows == 0).sum()) == 49408 - 4


def test_full_table_puts_every_row_at_its_token() -> None:
    name = "text_model.embeddings.token_embedding.weight"
    table = torch.arange(12.0).reshape(4, 3)
    packed = pack_text({name: table, "other": torch.ones(2)}, [7, 9, 49407])
    full = full_table(packed)
    assert set(full) == {name, "other"}
    assert torch.equal(full[name][[7, 9, 49407]], table[1:])
    assert torch.equal(full[name][8], table[0])
    assert full[name].shape == (49408, 3)
