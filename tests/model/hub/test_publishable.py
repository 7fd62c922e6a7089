"""Published metadata holds no path of this machine."""

from __future__ import annotations

from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.hub.upload import publishable


def test_published_metadata_holds_no_local_path() -> None:
    deep = "/".join(["", "srv", "me", "secret"])
    meta = HeadMeta(
        target=f"{deep}/tiny", data=f"{deep}/a.jsonl, someone/chats", start="../runs/best"
    )
    public = publishable(meta, None)
    assert (public.target, public.data, public.start) == ("tiny", "a.jsonl, someone/chats", "best")
    free_text = HeadMeta(target="x", data="responses of the target and/or mine, to 9,474 prompts")
    assert publishable(free_text, "someone/tiny").data == free_text.data
