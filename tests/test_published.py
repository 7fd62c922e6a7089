"""Heads that came with their target: read exactly, drafted with exactly, written back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import FAMILIES, Reference, write

from headstart.model.adopt import adopt
from headstart.model.fused import load_head, read_head_file
from headstart.model.heads import mtp
from headstart.model.target import Target

STEPS, LENGTH = 3, 14


@pytest.mark.parametrize("name", FAMILIES)
def test_every_step_is_the_published_formula(name: str, tmp_path: Path) -> None:
    layer = write(name, tmp_path / "model")
    adopt(tmp_path / "model", tmp_path / "head")
    target = Target.load(tmp_path / "model", dtype=torch.float32)
    opened = load_head(tmp_path / "head", target)
    head = mtp.Head(opened.config)
    head.load_state_dict(opened.state_dict())
    head.bind(target)
    # transformers' layers with experts compute in float32 at most.
    plain = head.config.family is None
    if plain:
        head.double()
    assert read_head_file(tmp_path / "head").head["kind"] == "mtp"
    generator = torch.Generator().manual_seed(5)
    tokens_BT = torch.randint(4, 96, (1, LENGTH), generator=generator)
    seen = target.read(tokens_BT, layers=head.layers)
    # MiMo reads the hidden state before the target's final norm, the others behind it.
    hidden_TD = seen.last_BTD[0].double()
    if name == "mimo":
        with torch.no_grad():
            states = target.model(tokens_BT, output_hidden_states=True)
        norm = target.model.model.norm
        raw_TD = seen.hidden[target.num_layers - 1][0]
        torch.testing.assert_close(norm(raw_TD), states.hidden_states[-1][0])
        hidden_TD = raw_TD.double()
    embedded = [target.embed(tokens_BT.roll(-1 - step, 1))[0].double() for step in range(STEPS)]
    expected = Reference(name, layer).steps(embedded, hidden_TD)
    with torch.no_grad():
        got = head.unroll(seen, tokens_BT, STEPS)
    tolerance = 1e-12 if plain else 2e-5
    for step in range(STEPS):
        mine, theirs = got[step][0].double(), expected[step]
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
        weight = target.model.lm_head.weight.double()
        torch.testing.assert_close(
            mine @ weight.T, theirs @ weight.T, rtol=10 * tolerance, atol=10 * tolerance
        )
