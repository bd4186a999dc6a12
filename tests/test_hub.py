"""What the Hub refuses or cannot give is told in words: which repository, what was found, what to do."""

import json

import pytest
from hub_client import run_client

# Repositories of "tester"; the folder of a whole model is uploaded to each.
UPLOADS = """
from huggingface_hub import HfApi
api = HfApi()
for name in ("open", "secret", "gated-digits", "busy-digits", "broken-digits"):
    api.create_repo(f"tester/{name}", private=name == "secret")
    api.upload_folder(repo_id=f"tester/{name}", folder_path=FOLDER, path_in_repo="inner" if name == "open" else "")
api.create_tag("tester/open", tag="v1.0")
api.create_repo("tester/bare")
api.upload_file(path_or_fileobj=b"{}", path_in_repo="notes.json", repo_id="tester/bare")
"""
# Every door of the package, and what it was told.
DOORS = """
import json
import time
import torch
from llava_lite import LlavaLiteProcessor, LlavaLlamaForCausalLM, load, load_pretrained_model
from llava_lite.hub import HubError

# The client asks five times more where a server is busy or broken, with longer and longer pauses.
time.sleep = lambda seconds: None

def words(door, *args, **kwargs):
    try:
        door(*args, **kwargs)
    except HubError as error:
        causes, cause = [], error.__cause__
        while cause is not None:
            causes.append(type(cause).__name__)
            cause = cause.__cause__ or cause.__context__
        return [str(error), causes]
    raise AssertionError("opened")

def tell(**found):
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    return tmp_path_factory.mktemp("homes")


@pytest.fixture
def uploads(hub, homes, toy_model, toy_tokenizer, toy_tower_dir):
    """Fill the Hub, once."""
    from llava_lite.mm_utils import load_image_processor
    from llava_lite.processing import LlavaLiteProcessor

    folder = homes / "model"
    if not folder.exists():
        model = toy_model(conv_template="v1")
        model.save_pretrained(folder)
        tower = load_image_processor(toy_tower_dir("clip"))
        LlavaLiteProcessor.from_config(model.config, toy_tokenizer, tower).save_pretrained(folder)
        run_client(hub, homes / "tester", f"FOLDER = {str(folder)!r}\n{UPLOADS}", start="")


@pytest.fixture
def told(uploads, hub, homes):
    """Return a function: code that calls `tell`, a user or None -> what was told, read."""

    def run(code, user=None, home="nobody", **more):
        printed = run_client(hub, homes / home, code, token=user, start=DOORS, **more)
        return json.loads(printed.splitlines()[-1])

    return run


def test_nobody_is_told_to_log_in(hub, told):
    said = told(
        """
        tell(
            secret=words(load, "tester/secret", device="cpu"),
            typo=words(load_pretrained_model, "tester/opne", device="cpu"),
            folder=words(LlavaLlamaForCausalLM.from_pretrained, "no_such_folder"),
            processor=words(LlavaLiteProcessor.from_pretrained, "tester/secret"),
            gated=words(load, "tester/gated-digits", device="cpu"),
            token=words(load, "tester/secret", device="cpu", token="expired-42"),
            busy=words(load, "tester/busy-digits", device="cpu"),
            broken=words(load, "tester/broken-digits", device="cpu"),
        )
        """
    )
    for name in ("secret", "typo", "folder", "processor"):
        words, causes = said[name]
        repo = {"typo": "tester/opne", "folder": "no_such_folder"}.get(name, "tester/secret")
        assert words.startswith(
            f"'{repo}' is no directory here, and the Hub shows no repository of that name ({hub}/{repo})"
        )
        assert "`hf auth login`" in words
        assert "RepositoryNotFoundError" in causes
    assert said["gated"][0] == (
        f"'tester/gated-digits' is gated: accept its terms on {hub}/tester/gated-digits, then log in with "
        "`hf auth login`, or set HF_TOKEN."
    )
    assert "GatedRepoError" in said["gated"][1]
    assert "does not take the token for 'tester/secret': it is mistyped, or has expired" in said["token"][0]
    assert (
        "asks for a pause (429, too many requests) at 'tester/busy-digits'. Try again in 1 seconds" in said["busy"][0]
    )
    assert "trouble of its own (503) at 'tester/broken-digits'. Try again later" in said["broken"][0]


def test_somebody_without_the_right_is_told_whom_to_ask(hub, told):
    said = told(
        """
        from huggingface_hub import HfApi
        from llava_lite.share import push_folder
        import pathlib, tempfile
        folder = pathlib.Path(tempfile.mkdtemp())
        (folder / "config.json").write_text("{}")
        tell(
            secret=words(load, "tester/secret", device="cpu"),
            gated=words(load, "tester/gated-digits", device="cpu"),
            revision=words(load, "tester/open", device="cpu", revision="v2"),
            file=words(load, "tester/bare", device="cpu"),
            subfolder=words(load, "tester/open", device="cpu", subfolder="outer"),
            whole=words(LlavaLlamaForCausalLM.from_pretrained, "tester/bare"),
            push=words(push_folder, folder, "tester/open"),
        )
        """,
        user="stranger",
        home="stranger",
    )
    assert "to the owner of your token. Check the spelling; if it is private, ask its owner" in said["secret"][0]
    assert f"Ask on {hub}/tester/gated-digits" in said["gated"][0]
    assert said["revision"][0] == (
        "repository 'tester/open' has no revision 'v2'; it has 'main', 'v1.0'. "
        "Give a branch, a tag or a whole commit id."
    )
    assert "RevisionNotFoundError" in said["revision"][1]
    for name, file in (("file", "config.json"), ("subfolder", "outer/config.json"), ("whole", "config.json")):
        repo = "tester/open" if name == "subfolder" else "tester/bare"
        assert said[name][0].startswith(f"repository '{repo}' has no file '{file}' in revision 'main'")
    assert "may not do this to 'tester/open'" in said["push"][0]


def test_without_a_network_the_cache_is_named_and_used(hub, told):
    fetch = 'load("tester/open", device="cpu", subfolder="inner")\ntell(done=1)'
    assert told(fetch, home="traveller") == {"done": 1}
    at_home = """
        model, processor = load("tester/open", device="cpu", subfolder="inner")
        tell(
            params=sum(p.numel() for p in model.parameters()),
            never=words(load, "tester/gated-digits", device="cpu"),
            asked=words(load, "tester/gated-digits", device="cpu", local_files_only=True),
        )
        """
    offline = told(at_home, home="traveller", HF_HUB_OFFLINE="1")
    assert offline["params"] > 0
    assert "'tester/gated-digits' is not in the cache, and asking the Hub is switched off" in offline["never"][0]
    assert "`hf download tester/gated-digits`), or run with HF_HUB_OFFLINE unset" in offline["never"][0]
    assert "or run without local_files_only=True" in offline["asked"][0]
    # A port where nobody listens.
    cut = told(at_home, home="traveller", HF_ENDPOINT="http://127.0.0.1:9")
    assert cut["params"] == offline["params"]
    assert "is not in the cache, and the Hub at http://127.0.0.1:9 cannot be reached (ConnectError" in cut["never"][0]


def test_a_cache_that_holds_a_part_is_told_from_a_repository_without_weights(told):
    words, _ = told(
        """
        from huggingface_hub import hf_hub_download
        hf_hub_download("tester/open", "inner/config.json")
        here = {"subfolder": "inner", "local_files_only": True}
        tell(part=words(LlavaLlamaForCausalLM.from_pretrained, "tester/open", **here))
        """,
        home="commuter",
    )["part"]
    assert words.startswith("'tester/open' is not in the cache as a whole: ")
    assert "`hf download tester/open`" in words


def test_command_line_says_it_in_one_line(uploads, hub, homes):
    code = """
        import sys
        from llava_lite.cli import main
        sys.exit(main(["chat", "tester/secret", "--device", "cpu"]))
        """
    errors = run_client(hub, homes / "nobody", code, token=None, start="", succeeds=False)
    assert errors.splitlines()[-1].startswith("llava-lite chat: 'tester/secret' is no directory here")
    assert "Traceback" not in errors


def test_command_line_opens_a_folder_of_a_revision(uploads, hub, homes):
    code = """
        import sys
        from llava_lite.cli import main
        flags = ["--subfolder", "inner", "--revision", "v1.0", "--cache-dir", "CACHE", "--device", "cpu"]
        sys.exit(main(["chat", "tester/open", *flags]))
        """
    printed = run_client(hub, homes / "nobody", code.replace("CACHE", str(homes / "own")), token=None, start="")
    assert "an empty line ends the chat" in printed
    assert list((homes / "own/models--tester--open/snapshots").glob("*/inner/model.safetensors"))
