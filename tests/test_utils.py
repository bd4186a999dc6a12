"""LLaVA's `utils`: logs of a server, what does nothing on purpose, MoE-LLaVA's looks at the router."""

import asyncio
import io
import logging
import subprocess
import sys

import pytest
import torch

from llava_lite import utils

MOE = {"num_experts": [4], "top_k_experts": 2, "moe_mode": "sparse"}


def test_what_is_logged_and_printed_goes_to_the_file_of_the_server_once(tmp_path):
    """In a process of its own, since the streams of the process are replaced."""
    code = (
        "import logging\nfrom llava_lite import constants\nconstants.LOGDIR = 'logs'\n"
        "from llava_lite.utils import build_logger\nearly = logging.getLogger('early')\n"
        "worker = build_logger('worker', 'worker.log')\nassert build_logger('worker', 'worker.log') is worker\n"
        "worker.info('first')\nearly.warning('second')\nprint('third')\nprint('in', 'one line', end='')\nprint()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "logs" / "worker.log").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ", 1)[1] for line in lines] == [
        "INFO | worker | first",
        "WARNING | early | second",
        "INFO | stdout | third",
        "INFO | stdout | in one line",
    ]
    assert done.stderr.count("third") == 1


def test_stream_logs_complete_lines_and_the_rest_when_it_is_flushed(caplog):
    terminal = io.StringIO()
    stream = utils.StreamToLogger(logging.getLogger("stream"), logging.WARNING, terminal)
    with caplog.at_level(logging.WARNING, "stream"):
        stream.write("one\ntw")
        assert [record.message for record in caplog.records] == ["one"]
        stream.write("o\n\nthree")
        stream.flush()
        stream.flush()
    assert [record.message for record in caplog.records] == ["one", "two", "", "three"]
    assert terminal.getvalue() == ""
    assert stream.isatty() is False


def test_torch_keeps_its_initialisation():
    reset = torch.nn.Linear.reset_parameters
    assert utils.disable_torch_init() is None
    assert torch.nn.Linear.reset_parameters is reset


def test_no_text_is_sent_to_a_moderation_service(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with pytest.raises(RuntimeError, match="sends what users write to no moderation service"):
        utils.violates_moderation("Hello!")


def test_a_semaphore_is_printed_with_its_value():
    assert utils.pretty_print_semaphore(None) == "None"
    semaphore = asyncio.Semaphore(3)
    assert utils.pretty_print_semaphore(semaphore) == "Semaphore(value=3, locked=False)"
    asyncio.run(semaphore.acquire())
    assert utils.pretty_print_semaphore(semaphore) == "Semaphore(value=2, locked=False)"


def test_k_entries_are_drawn_in_their_order():
    assert utils.order_pick_k([3, 1, 2], 3) == [3, 1, 2]
    drawn = [tuple(utils.order_pick_k(list("abcdef"), 2)) for _ in range(200)]
    assert all(a < b for a, b in drawn)
    assert len(set(drawn)) == 15, "every pair comes up in 200 draws, but for one time in 60,000"


def test_hooks_keep_the_logits_of_every_router(toy_model):
    model = toy_model(moe=MOE)
    hooks = utils.get_gating_logit_by_hook(model)
    seen = {}
    for layer, block in model.moe_layers().items():
        block.register_forward_hook(lambda block, given, out, layer=layer: seen.__setitem__(layer, (given[0], block)))
    model(input_ids=torch.tensor([[1, 5, 9, 7]]))
    assert len(hooks) == 2
    for hook, layer in zip(hooks, (0, 2), strict=True):
        hidden, block = seen[layer]
        torch.testing.assert_close(hook.fea, hidden[0] @ block.gate.weight.T)


def test_dense_model_has_no_router_to_look_at(toy_model):
    assert utils.get_gating_logit_by_hook(toy_model()) == []
