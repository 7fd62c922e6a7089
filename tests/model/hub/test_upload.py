"""Publishing on a Hub and loading back: the real client against a small local server."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chat_model import save
from hub_process import Worker
from hub_server import READ_TOKEN, TOKEN, USER, Hub, running
from huggingface_hub import ModelCard

from headstart.model.checkpoint.custom_generate.write import FILES
from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.fused import record
from headstart.model.checkpoint.head import save_head
from headstart.model.checkpoint.metadata import HeadMeta, Measurement
from headstart.model.checkpoint.model_card import is_edited
from headstart.model.heads.common.base import DraftHead, make_head
from headstart.model.target.load import load_target

pytestmark = pytest.mark.slow
BASE = "someone/tiny"
MEASURED = Measurement(
    prompts="talk.jsonl, 8 prompts, 64 tokens each at most",
    tokens=512,
    acceptance_length=2.25,
    speedup=1.5,
    responses=8,
    identical=8,
    conditions="a machine, float32",
)


def make(folder: Path, seed: int = 0) -> tuple[Path, DraftHead]:
    """A target in `plain`, its head in `head` and both in `fused`."""
    save(folder / "plain", seed=seed)
    (folder / "plain" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    target = load_target(folder / "plain")
    torch.manual_seed(1)
    head = make_head(target, "eagle3", {})
    data = str(folder / "private" / "responses.jsonl")
    meta = HeadMeta(target=BASE, tokens=123456, data=data, recipe={"train": {"lr": 0.01}})
    save_head(head, folder / "head", meta)
    fuse(folder / "plain", folder / "head", folder / "fused")
    record(folder / "fused", head, MEASURED)
    return folder, head


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made"))[0]


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture(scope="module")
def worker(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    made = Worker(server, tmp_path_factory.mktemp("home"))
    yield made
    made.close()


@pytest.fixture
def hub(server: Hub) -> Hub:
    """The server without repositories but the target's own."""
    for part in (server.repos, server.blobs, server.sent, server.drops, server.calls):
        part.clear()
    server.put(BASE, {"config.json": b"{}", "README.md": b"---\nlicense: mit\n---\n# Tiny\n"})
    return server


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A repository for each test, since the client has a cache."""
    return f"{USER}/{request.node.name.replace('[', '-').rstrip(']')}"


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_fused_checkpoint_is_uploaded_and_loaded_back(
    hub: Hub, worker: Worker, made: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(made / "fused", tmp_path / "fused")
    for left in (".cache/huggingface/upload/state", "draft_heads/.model.safetensors.part"):
        (folder / left).parent.mkdir(parents=True, exist_ok=True)
        (folder / left).write_text("left by an interrupted download or save")
    before = files(folder)
    output = worker.run("push", folder, name, "--private", "--message", "my first head")
    repo = hub.repos[name]
    assert f"{hub.url}/{name} (commit {repo.head.sha[:7]})" in output
    assert repo.private and repo.head.message == "my first head" and len(repo.commits) == 2
    assert files(folder) == before
    sent = repo.head.files
    hidden = {".cache/huggingface/upload/state", "draft_heads/.model.safetensors.part"}
    assert sent.keys() == (before.keys() - hidden) | {".gitattributes"}
    written = {"README.md", "draft_heads/config.json"}
    assert all(sent[path] == before[path] for path in before.keys() - hidden - written)
    assert str(made) not in (sent["README.md"] + sent["draft_heads/config.json"]).decode()
    assert json.loads(sent["draft_heads/config.json"])["headstart"]["meta"]["data"] == (
        "responses.jsonl"
    )

    options = ["hello", "--max-new-tokens", 8, "--dtype", "float32", "--budget", "8"]
    assert (
        worker.run("generate", name, *options).splitlines()[:2]
        == (worker.run("generate", folder, *options).splitlines()[:2])
    )
    same = worker.code(
        "import torch\n"
        "from headstart.inference import SpeculativeModel\n"
        f"ours = SpeculativeModel.from_pretrained({str(folder)!r})\n"
        f"back = SpeculativeModel.from_pretrained({name!r}, revision='main')\n"
        "pairs = zip(ours.head.state_dict().items(), back.head.state_dict().items())\n"
        "print(all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs), back.target.name)\n"
        "pairs = zip(ours.target.model.parameters(), back.target.model.parameters())\n"
        "print(all(torch.equal(x, y) for x, y in pairs))\n"
    )
    assert same.splitlines() == [f"True {name}", "True"]
    plain = worker.code(
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({name!r})\n"
        "print(sum(float(one.double().sum()) for one in model.parameters()))"
    )
    ours = load_target(folder).model
    assert plain == str(sum(float(one.double().sum()) for one in ours.parameters()))
    (tmp_path / "p.jsonl").write_text('{"prompt": "hi"}\n')
    options = ["--prompts", tmp_path / "p.jsonl", "--max-new-tokens", 4, "--budget", "8"]
    assert f'"target": "{name}"' in worker.run("eval", name, *options)
    got = {call.rsplit("/", 1)[1] for call in hub.calls if call.startswith("GET /me")}
    assert "README.md" not in got and "README.target.md" not in got  # only files that are used

    worker.run("push", folder, name)  # nothing new: no empty commit
    assert len(repo.commits) == 2


def test_transformers_drafts_with_the_uploaded_code(
    hub: Hub, worker: Worker, made: Path, tmp_path: Path, name: str
) -> None:
    worker.run("push", made / "fused", name)
    printed = worker.code(
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({name!r})\n"
        "more = {'max_new_tokens': 12, 'do_sample': False, 'eos_token_id': None}\n"
        "ids = torch.tensor([[3, 1, 4]])\n"
        "plain = model.generate(ids, **more)\n"
        f"more |= {{'custom_generate': {name!r}, 'trust_remote_code': True}}\n"
        "print(torch.equal(model.generate(ids, **more), plain), len(plain[0]))"
    )
    assert printed == "True 15"
    # Code that the new checkpoint does not have is removed, since it would not fit.
    folder = shutil.copytree(made / "fused", tmp_path / "fused")
    shutil.rmtree(folder / "custom_generate")
    assert set(FILES) <= hub.repos[name].head.files.keys()
    worker.run("push", folder, name)
    assert not set(FILES) & hub.repos[name].head.files.keys()


def test_the_card_shows_what_was_measured(
    hub: Hub, worker: Worker, made: Path, tmp_path: Path, name: str
) -> None:
    worker.run("push", made / "fused", name)
    (tmp_path / "README.md").write_bytes(hub.repos[name].head.files["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == BASE and data["license"] == "apache-2.0"
    assert data["library_name"] == "headstart" and "eagle3" in data["tags"]
    results = data["model-index"][0]["results"]
    assert [one["dataset"]["name"] for one in results] == [MEASURED.prompts]
    metrics = {one["type"]: one["value"] for one in results[0]["metrics"]}
    assert metrics == {
        "acceptance_length": 2.25,
        "speedup": 1.5,
        "identical_to_baseline": 1.0,
    }
    for part in (
        "8 of 8 responses equal those of autoregressive decoding",
        f'SpeculativeModel.from_pretrained("{name}")',
        f'model="{name}"',
        f"hf download {name} --local-dir fused",
        "vllm serve fused",
        "--model-path fused",
        "lr: 0.01",
        "123,456",
    ):
        assert part in card.text, part


def test_a_head_alone_is_fused_from_the_hub(
    hub: Hub, worker: Worker, made: Path, tmp_path: Path, name: str
) -> None:
    worker.run("push", made / "head", name)
    card = hub.repos[name].head.files["README.md"].decode()
    assert f"headstart fuse {BASE} {name} fused" in card
    assert f"base_model: {BASE}" in card and "license: mit" in card  # the target's, from the Hub
    worker.run("fuse", made / "plain", name, tmp_path / "out")
    ours, theirs = files(tmp_path / "out"), files(made / "fused")
    weights = [path for path in theirs if path.endswith(".safetensors")]
    assert len(weights) == 2 and all(ours[path] == theirs[path] for path in weights)
    assert "eagle3" in worker.run("inspect", "head", name)
    alone = worker.refused("generate", name, "hello")
    assert f"headstart fuse TARGET {name} OUT" in alone
    # Replaced by the fused checkpoint, with no weights of the head left at the root.
    worker.run("push", made / "fused", name)
    assert worker.run("generate", name, "hello", "--max-new-tokens", 2, "--plain")
    back = worker.refused("push", made / "head", name)
    assert "a fused checkpoint, while this is a head alone" in back


def test_a_head_of_a_nameless_target_needs_a_base_model(
    hub: Hub, worker: Worker, made: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(made / "head", tmp_path / "head")
    config = json.loads((folder / "config.json").read_text())
    config["headstart"]["meta"]["target"] = str(tmp_path / "target")
    (folder / "config.json").write_text(json.dumps(config))
    assert "--base-model owner/name" in worker.refused("push", folder, name)
    assert name not in hub.repos
    worker.run("push", folder, name, "--base-model", BASE)
    sent = json.loads(hub.repos[name].head.files["config.json"])
    assert sent["headstart"]["meta"]["target"] == BASE


def test_a_branch_is_created_and_loaded(hub: Hub, worker: Worker, made: Path, name: str) -> None:
    worker.run("push", made / "fused", name, "--revision", "dev")
    assert "config.json" not in hub.repos[name].head.files
    assert "holds no draft head" in worker.refused("generate", name, "hello")
    options = ["hello", "--max-new-tokens", 2, "--plain"]
    assert worker.run("generate", f"{name}@dev", *options)
    assert "no such branch, tag or commit" in worker.refused("generate", f"{name}@v9", *options)


@pytest.mark.parametrize("token", [None, "hf_wrong", READ_TOKEN])
def test_missing_wrong_and_read_only_tokens(
    hub: Hub, worker: Worker, made: Path, name: str, token: str | None
) -> None:
    message = worker.refused("push", made / "fused", name, token=token)
    expected = {
        None: "You are not logged in",
        "hf_wrong": "does not know your token",
        READ_TOKEN: "Your token may not write to me/",
    }
    assert expected[token] in message and "hf auth login" in message
    assert name not in hub.repos and not hub.blobs


def test_errors_come_before_anything_is_sent(
    hub: Hub, worker: Worker, made: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere", made / "plain"):
        assert "neither a fused" in worker.refused("push", folder, "me/x") or folder.name == "plain"
    assert "holds no draft head" in worker.refused("push", made / "plain", "me/x")
    for wrong in ("tiny", "a/b/c", "me/", "me/-x", "me/x y"):
        assert "Write owner/name" in worker.refused("push", made / "fused", wrong)
    assert not hub.calls
    assert "may not write to them/x" in worker.refused("push", made / "fused", "them/x")
    cut = shutil.copytree(made / "fused", tmp_path / "cut")
    (cut / "draft_heads" / "model.safetensors").write_bytes(b"truncated")
    assert "cannot be read" in worker.refused("push", cut, "me/x")
    for file in cut.glob("*.safetensors"):
        file.unlink()
    shutil.copytree(made / "fused" / "draft_heads", cut / "draft_heads", dirs_exist_ok=True)
    assert "lost its target's weights" in worker.refused("push", cut, "me/x")
    hub.down = True
    try:
        assert "could not be reached" in worker.refused("push", made / "fused", "me/x")
        assert "could not be reached" in worker.refused("generate", "me/unknown", "hello")
    finally:
        hub.down = False
    assert list(hub.repos) == [BASE] and not hub.blobs


def test_another_model_is_not_replaced(
    hub: Hub, worker: Worker, made: Path, tmp_path: Path, name: str
) -> None:
    old = {"config.json": b"{}", "pytorch_model.bin": b"1", "model-1.safetensors": b"2"}
    hub.put(name, old | {"plot.png": b"3"})
    assert "holds another model (config.json" in worker.refused("push", made / "fused", name)
    assert hub.repos[name].head.message == "by hand"
    worker.run("push", made / "fused", name, "--replace")
    left = hub.repos[name].head.files
    assert "plot.png" in left and not left.keys() & {"pytorch_model.bin", "model-1.safetensors"}
    other, _ = make(tmp_path / "other", seed=5)
    assert "a head for another target" in worker.refused("push", other / "fused", name)
    public = worker.refused("push", made / "fused", name, "--private")
    assert "exists and is public" in public
    hub.race = True
    try:
        meanwhile = worker.refused("push", other / "fused", name, "--replace")
    finally:
        hub.race = False
    assert "changed on the Hub in the meantime" in meanwhile
    assert hub.repos[name].head.message == "meanwhile"


def test_an_edited_card_is_kept(
    hub: Hub, worker: Worker, made: Path, tmp_path: Path, name: str
) -> None:
    worker.run("push", made / "fused", name)
    repo = hub.repos[name]
    assert not is_edited(repo.head.files["README.md"].decode())
    edited = repo.head.files["README.md"] + b"\nThanks to my cat.\n"
    repo.add("main", "on the web page", repo.head.files | {"README.md": edited})
    assert "edited on the Hub and is kept" in worker.run("push", made / "fused", name)
    assert repo.head.files["README.md"] == edited
    worker.run("push", made / "fused", name, "--replace")
    assert not is_edited(repo.head.files["README.md"].decode())

    folder = shutil.copytree(made / "fused", tmp_path / "fused")
    (folder / "README.md").write_text("# By hand\n")
    assert "published as it is" in worker.run("push", folder, name)
    assert repo.head.files["README.md"] == b"# By hand\n"
    (folder / "README.md").write_text("# By hand, again\n")
    worker.run("push", folder, name)
    assert repo.head.files["README.md"] == b"# By hand, again\n"


def test_an_interrupted_upload_resumes(hub: Hub, worker: Worker, made: Path, name: str) -> None:
    target = digest(made / "fused" / "model.safetensors")
    head = digest(made / "fused" / "draft_heads" / "model.safetensors")
    hub.drops[target] = 1000
    message = worker.refused("push", made / "fused", name)
    assert "was interrupted" in message and "Run the same command again" in message
    assert hub.sent == {head: 1} and "config.json" not in hub.repos[name].head.files
    hub.drops[target] = 1  # the client itself retries
    worker.run("push", made / "fused", name)
    assert hub.sent == {head: 1, target: 1}
    assert hub.repos[name].head.files["model.safetensors"] == hub.blobs[target]


def test_a_download_resumes_and_the_cache_serves_offline(
    hub: Hub, server: Hub, worker: Worker, made: Path, tmp_path: Path, name: str
) -> None:
    worker.run("push", made / "fused", name)
    hub.drops["model.safetensors"] = 1
    options = ["generate", name, "hello", "--max-new-tokens", 4, "--plain"]
    online = Worker(server, tmp_path / "home")
    text = online.run(*options)
    online.close()
    assert hub.drops["model.safetensors"] < 0  # it happened
    hub.calls.clear()
    offline = Worker(server, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert offline.run(*options).splitlines()[:2] == text.splitlines()[:2]
    assert "HF_HUB_OFFLINE forbids" in offline.refused("generate", f"{USER}/never", "hello")
    assert "HF_HUB_OFFLINE forbids" in offline.refused("push", made / "fused", name)
    offline.close()
    assert not hub.calls


def test_commands_do_not_change_a_checkpoint_on_the_hub(
    hub: Hub, worker: Worker, made: Path, tmp_path: Path, name: str
) -> None:
    worker.run("push", made / "fused", name)
    for command in (["eval", name, "--record"], ["calibrate", name, "--responses", tmp_path / "a"]):
        assert "takes a folder" in worker.refused(*command)
    assert "no repository of this name" in worker.refused("generate", "me/typo", "hello")
    private = hub.repos[name]
    private.private = True
    message = worker.refused("inspect", "head", f"{name}@main", token=None)
    assert "a private one that is not yours" in message
    hub.put("me/plain", {"config.json": b"{}"})
    assert "holds no draft head" in worker.refused("generate", "me/plain", "hello", token=TOKEN)
