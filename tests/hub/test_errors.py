"""What the Hub refuses or lacks is reported: which repository, what was found, what to do."""

import json

import pytest
from hub_client import run_client

# Repositories of "tester"; the directory of a full model is uploaded to each.
UPLOADS = """
from huggingface_hub import HfApi
api = HfApi()
for name in ("open", "secret", "gated-digits", "busy-digits", "broken-digits"):
    api.create_repo(f"tester/{name}", private=name == "secret")
    api.upload_folder(repo_id=f"tester/{name}", folder_path=DIRECTORY, path_in_repo="inner" if name == "open" else "")
api.create_tag("tester/open", tag="v1.0")
api.create_repo("tester/bare")
api.upload_file(path_or_fileobj=b"{}", path_in_repo="notes.json", repo_id="tester/bare")
"""
# Every entry point of the package, and the message that it got.
ENTRY_POINTS = """
import json
import time
import torch
from llava_lite import LlavaLiteProcessor, LlavaLlamaForCausalLM, load, load_pretrained_model
from llava_lite.hub.errors import HubError

# The client asks five times more where a server is busy or broken, with longer and longer pauses.
time.sleep = lambda seconds: None

def words(entry, *args, **kwargs):
    try:
        entry(*args, **kwargs)
    except HubError as error:
        causes, cause = [], error.__cause__
        while cause is not None:
            causes.append(type(cause).__name__)
            cause = cause.__cause__ or cause.__context__
        return [str(error), causes]
    raise AssertionError("opened")

def report(**found):
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    return tmp_path_factory.mktemp("homes")


@pytest.fixture
def uploads(hub, homes, toy_model, toy_tokenizer, toy_tower_dir):
    """Fill the Hub, once."""
    from llava_lite.media.preprocess import load_image_processor
    from llava_lite.processing.processor import LlavaLiteProcessor

    directory = homes / "model"
    if not directory.exists():
        model = toy_model(conv_template="v1")
        model.save_pretrained(directory)
        tower = load_image_processor(toy_tower_dir("clip"))
        LlavaLiteProcessor.from_config(model.config, toy_tokenizer, tower).save_pretrained(directory)
        run_client(hub, homes / "tester", f"DIRECTORY = {str(directory)!r}\n{UPLOADS}", start="")


@pytest.fixture
def reported(uploads, hub, homes):
    """Return a function: code that calls `report`, a user or None -> what it reported, parsed."""

    def run(code, user=None, home="nobody", **more):
        printed = run_client(hub, homes / home, code, token=user, start=ENTRY_POINTS, **more)
        return json.loads(printed.splitlines()[-1])

    return run


def test_an_anonymous_user_is_asked_to_log_in(hub, reported):
    output = reported(
        """
        report(
            secret=words(load, "tester/secret", device="cpu"),
            typo=words(load_pretrained_model, "tester/opne", device="cpu"),
            directory=words(LlavaLlamaForCausalLM.from_pretrained, "no_such_directory"),
            processor=words(LlavaLiteProcessor.from_pretrained, "tester/secret"),
            gated=words(load, "tester/gated-digits", device="cpu"),
            token=words(load, "tester/secret", device="cpu", token="expired-42"),
            busy=words(load, "tester/busy-digits", device="cpu"),
            broken=words(load, "tester/broken-digits", device="cpu"),
        )
        """
    )
    for name in ("secret", "typo", "directory", "processor"):
        words, causes = output[name]
        repo = {"typo": "tester/opne", "directory": "no_such_directory"}.get(name, "tester/secret")
        assert words.startswith(
            f"'{repo}' is no directory here, and the Hub shows no repository of that name ({hub}/{repo})"
        )
        assert "`hf auth login`" in words
        assert "RepositoryNotFoundError" in causes
    assert output["gated"][0] == (
        f"'tester/gated-digits' is gated: accept its terms on {hub}/tester/gated-digits, then log in with "
        "`hf auth login`, or set HF_TOKEN."
    )
    assert "GatedRepoError" in output["gated"][1]
    assert "does not take the token for 'tester/secret': it is mistyped, or has expired" in output["token"][0]
    assert (
        "asks for a pause (429, too many requests) at 'tester/busy-digits'. Try again in 1 seconds"
        in output["busy"][0]
    )
    assert "trouble of its own (503) at 'tester/broken-digits'. Try again later" in output["broken"][0]


def test_a_user_without_access_is_referred_to_who_can_grant_it(hub, reported):
    output = reported(
        """
        from huggingface_hub import HfApi
        from llava_lite.hub.push import push_directory
        import pathlib, tempfile
        directory = pathlib.Path(tempfile.mkdtemp())
        (directory / "config.json").write_text("{}")
        report(
            secret=words(load, "tester/secret", device="cpu"),
            gated=words(load, "tester/gated-digits", device="cpu"),
            revision=words(load, "tester/open", device="cpu", revision="v2"),
            file=words(load, "tester/bare", device="cpu"),
            subfolder=words(load, "tester/open", device="cpu", subfolder="outer"),
            full=words(LlavaLlamaForCausalLM.from_pretrained, "tester/bare"),
            push=words(push_directory, directory, "tester/open"),
        )
        """,
        user="stranger",
        home="stranger",
    )
    assert "to the owner of your token. Check the spelling; if it is private, ask its owner" in output["secret"][0]
    assert f"Ask on {hub}/tester/gated-digits" in output["gated"][0]
    assert output["revision"][0] == (
        "repository 'tester/open' has no revision 'v2'; it has 'main', 'v1.0'. "
        "Give a branch, a tag or a full commit id."
    )
    assert "RevisionNotFoundError" in output["revision"][1]
    for name, file in (("file", "config.json"), ("subfolder", "outer/config.json"), ("full", "config.json")):
        repo = "tester/open" if name == "subfolder" else "tester/bare"
        assert output[name][0].startswith(f"repository '{repo}' has no file '{file}' in revision 'main'")
    assert "may not do this to 'tester/open'" in output["push"][0]


def test_without_a_network_the_cache_is_named_and_used(hub, reported):
    fetch = 'load("tester/open", device="cpu", subfolder="inner")\nreport(done=1)'
    assert reported(fetch, home="traveller") == {"done": 1}
    at_home = """
        model, processor = load("tester/open", device="cpu", subfolder="inner")
        report(
            params=sum(p.numel() for p in model.parameters()),
            never=words(load, "tester/gated-digits", device="cpu"),
            asked=words(load, "tester/gated-digits", device="cpu", local_files_only=True),
        )
        """
    offline = reported(at_home, home="traveller", HF_HUB_OFFLINE="1")
    assert offline["params"] > 0
    assert "'tester/gated-digits' is not in the cache, and asking the Hub is switched off" in offline["never"][0]
    assert "`hf download tester/gated-digits`), or run with HF_HUB_OFFLINE unset" in offline["never"][0]
    assert "or run without local_files_only=True" in offline["asked"][0]
    # A port where nobody listens.
    cut = reported(at_home, home="traveller", HF_ENDPOINT="http://127.0.0.1:9")
    assert cut["params"] == offline["params"]
    assert "is not in the cache, and the Hub at http://127.0.0.1:9 cannot be reached (ConnectError" in cut["never"][0]


def test_a_cache_that_holds_a_part_is_distinguished_from_a_repository_without_weights(reported):
    words, _ = reported(
        """
        from huggingface_hub import hf_hub_download
        hf_hub_download("tester/open", "inner/config.json")
        here = {"subfolder": "inner", "local_files_only": True}
        report(part=words(LlavaLlamaForCausalLM.from_pretrained, "tester/open", **here))
        """,
        home="commuter",
    )["part"]
    assert words.startswith("'tester/open' is not completely in the cache: ")
    assert "`hf download tester/open`" in words


def test_command_line_reports_it_in_one_line(uploads, hub, homes):
    code = """
        import sys
        from llava_lite.cli import main
        sys.exit(main(["chat", "tester/secret", "--device", "cpu"]))
        """
    errors = run_client(hub, homes / "nobody", code, token=None, start="", succeeds=False)
    assert errors.splitlines()[-1].startswith("llava-lite chat: 'tester/secret' is no directory here")
    assert "Traceback" not in errors


def test_command_line_opens_a_directory_of_a_revision(uploads, hub, homes):
    code = """
        import sys
        from llava_lite.cli import main
        flags = ["--subfolder", "inner", "--revision", "v1.0", "--cache-dir", "CACHE", "--device", "cpu"]
        sys.exit(main(["chat", "tester/open", *flags]))
        """
    printed = run_client(hub, homes / "nobody", code.replace("CACHE", str(homes / "own")), token=None, start="")
    assert "an empty line ends the chat" in printed
    assert list((homes / "own/models--tester--open/snapshots").glob("*/inner/model.safetensors"))
