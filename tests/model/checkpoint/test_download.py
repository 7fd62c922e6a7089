"""Names of checkpoints: folders, and repositories on the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from headstart.model.checkpoint.download import hub_name, require_folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("me/tiny", ("me/tiny", None)),
        ("me/tiny@v1.0", ("me/tiny", "v1.0")),
        ("me/tiny@refs/pr/1", ("me/tiny", "refs/pr/1")),
        (Path("me/tiny"), ("me/tiny", None)),
        ("tiny", None),
        ("../tiny", None),
        ("~/tiny", None),
        ("a/b/c", None),
        ("here/tiny", None),
    ],
)
def test_an_existing_folder_takes_precedence_over_the_hub(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str | Path,
    expected: tuple[str, str | None] | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "tiny").mkdir(parents=True)
    assert hub_name(name) == expected


def test_a_checkpoint_on_the_hub_is_not_changed() -> None:
    require_folder("tiny", "Calibrating")
    with pytest.raises(ValueError, match=r"Calibrating changes a checkpoint.*hf download me/tiny"):
        require_folder("me/tiny", "Calibrating")
