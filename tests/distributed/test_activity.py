"""Whether a process waits for other ranks, from where its main thread is."""

import _thread
import sys
import threading
import time
from traceback import FrameSummary, walk_stack

import pytest
import torch

from llava_lite.distributed.activity import describe_place, get_stack, is_in_collective, waiting_for_ranks

SITE = "/venv/lib/python3.11/site-packages/"
NVTX = (f"{SITE}deepspeed/utils/nvtx.py", "wrapped_fn")
PARAMETERS = f"{SITE}deepspeed/runtime/zero/partition_parameters.py"
COORDINATOR = (f"{SITE}deepspeed/runtime/zero/partitioned_param_coordinator.py", "fetch_sub_module")
STEP = (f"{SITE}deepspeed/runtime/zero/stage3.py", "step")
OPERATOR = (f"{SITE}torch/_ops.py", "__call__")
MODEL = (f"{SITE}transformers/models/llama/modeling_llama.py", "forward")


def stack(*frames):
    """Return a stack; frames: (file, function, line of code), the innermost first."""
    lines = [(*frame, "call()")[:3] for frame in frames]
    return [FrameSummary(file, 7, name, lookup_line=False, line=line) for file, name, line in lines]


WAITING = {
    "torch": [(f"{SITE}torch/distributed/distributed_c10d.py", "all_reduce"), MODEL],
    "torch on Windows": [(r"C:\venv\torch\distributed\distributed_c10d.py", "all_reduce"), MODEL],
    "DDP's buffers": [(f"{SITE}torch/nn/parallel/distributed.py", "_distributed_broadcast_coalesced"), MODEL],
    "DDP's gradients": [(f"{SITE}torch/autograd/graph.py", "_engine_run_backward"), MODEL],
    "DeepSpeed": [(f"{SITE}deepspeed/comm/torch.py", "barrier"), MODEL],
    # The handle is torch's, and its wait is C; a layer of several weights, and of one.
    "ZeRO-3's weights": [NVTX, (PARAMETERS, "wait"), NVTX, COORDINATOR, NVTX, MODEL],
    "ZeRO-3's weight": [NVTX, (PARAMETERS, "wait"), COORDINATOR, NVTX, MODEL],
    "weights gathered": [(PARAMETERS, "wait"), (PARAMETERS, "__enter__"), MODEL],
    "weights after an update": [(PARAMETERS, "_allgather_params_coalesced", "handle.wait()"), NVTX, STEP],
    "ZeRO-3's gradients": [(*STEP, "self.param_reduce_events.popleft().synchronize()")],
    "a number": [(f"{SITE}transformers/generation/utils.py", "generate", "if flag.item() == 0.0:")],
    "numbers": [("/home/me/llava_lite/train/part.py", "agree", "return highest.tolist()")],
    "an operator": [OPERATOR, (f"{SITE}torch/distributed/_functional_collectives.py", "wait_tensor")],
    "a device": [(f"{SITE}torch/cuda/__init__.py", "synchronize"), STEP],
    "a stream": [(f"{SITE}torch/cuda/streams.py", "synchronize"), STEP],
    "an event in C": [(f"{SITE}deepspeed/accelerator/cuda_accelerator.py", "synchronize"), STEP],
}
WORKING = {
    "a layer": [MODEL, NVTX],
    "a hook under ZeRO-3": [("/home/me/hooks.py", "wait"), NVTX, COORDINATOR],
    "a wait for something else": [("/home/me/hooks.py", "upload", "upload.wait()"), NVTX, COORDINATOR],
    "items": [("/home/me/hooks.py", "upload", "for name, value in values.items():"), MODEL],
    "the coordinator": [COORDINATOR, NVTX, MODEL],
    "a weight is put together": [NVTX, (PARAMETERS, "_partition_param"), MODEL],
    "an operator": [OPERATOR, MODEL],
    "an optimizer": [(f"{SITE}torch/optim/adamw.py", "step"), STEP],
    "no Python code": [],
}


@pytest.mark.parametrize("frames", WAITING.values(), ids=WAITING)
def test_a_stack_that_waits_for_other_ranks_is_known(frames):
    assert is_in_collective(stack(*frames))


@pytest.mark.parametrize("frames", WORKING.values(), ids=WORKING)
def test_a_stack_that_works_is_not_taken_for_one_that_waits(frames):
    assert not is_in_collective(stack(*frames))
    with waiting_for_ranks():
        assert is_in_collective(stack(*frames))


def test_the_names_of_deepspeed_and_torch_that_are_looked_for_exist():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero import partition_parameters as zero
    from deepspeed.utils.nvtx import instrument_w_nvtx

    # What is between a wrapper and the function that it calls is read from a real call.
    found = []
    instrument_w_nvtx(lambda: found.append(get_frames()))()
    assert found[0][1:2] == [("deepspeed/utils/nvtx.py", "wrapped_fn")]
    for handle in (zero.AllGatherHandle, zero.AllGatherCoalescedHandle, zero.MultipleAllGatherHandles):
        assert callable(handle.wait)
    # The main thread's last Python code in a backward pass, where a hook calls back.
    loss = torch.ones(1, requires_grad=True) * 2
    loss.register_hook(lambda grad: found.append(get_frames()))
    loss.backward()
    assert found[1][1] == ("torch/autograd/graph.py", "_engine_run_backward")


def get_frames():
    """Return [(end of the file, function)] of the callers of the function that calls this, innermost first."""
    frame, frames = sys._getframe(1), []
    while frame is not None:
        file = "/".join(frame.f_code.co_filename.replace("\\", "/").split("/")[-3:])
        frames.append((file, frame.f_code.co_name))
        frame = frame.f_back
    return frames


def look_while_waiting(call):
    """Return what `get_stack` finds while this main thread is in `call(wait)`; wait: a C function."""
    lock, stacks = _thread.allocate_lock(), []
    lock.acquire()

    def look():
        main = threading.main_thread().ident
        while call.__name__ not in {frame.f_code.co_name for frame, _ in walk_stack(sys._current_frames()[main])}:
            time.sleep(0.01)
        # Long enough to be in C.
        time.sleep(0.3)
        stacks.append(get_stack())
        lock.release()

    thread = threading.Thread(target=look)
    thread.start()
    call(lock.acquire)
    thread.join()
    return stacks[0]


def test_a_stack_ends_where_the_wrapper_was_called():
    wrap = pytest.importorskip("deepspeed.utils.nvtx").instrument_w_nvtx

    def gather(wait):
        wrap(wait)()

    found = look_while_waiting(gather)
    assert found[0].name == "gather"
    assert describe_place(found).endswith("in gather: wrap(wait)()")


def test_a_backward_pass_is_where_its_hooks_are_in_threads_of_the_device(monkeypatch):
    # pytest-xdist has threads of this kind of its own.
    get_frames = sys._current_frames
    others = get_frames().keys() - {thread.ident for thread in threading.enumerate()}
    monkeypatch.setattr(
        sys, "_current_frames", lambda: {ident: frame for ident, frame in get_frames().items() if ident not in others}
    )
    code: dict = {}
    exec(compile("def run_backward(wait): wait()", "/site-packages/torch/autograd/graph.py", "exec"), code)
    found = look_while_waiting(code["run_backward"])
    assert found[0].name == "run_backward"
    assert is_in_collective(found)
    ended, is_there = _thread.allocate_lock(), threading.Event()
    ended.acquire()

    def hook():
        is_there.set()
        # Gives the thread a name, as a logger does.
        threading.current_thread()
        ended.acquire()
        ended.release()

    # Not of `threading`, as the threads of the engine.
    _thread.start_new_thread(hook, ())
    is_there.wait()
    try:
        found = look_while_waiting(code["run_backward"])
    finally:
        ended.release()
    assert found[0].name == "hook"
    assert not is_in_collective(found)
