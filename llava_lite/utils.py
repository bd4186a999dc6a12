"""Answer to the names of LLaVA's and MoE-LLaVA's `utils`: logs of a server, sampling in order, looks at the router."""

import logging
import os
import random
import sys
from logging.handlers import TimedRotatingFileHandler

from llava_lite import constants
from llava_lite.output_file import ESCAPED

logger = logging.getLogger(__name__)

server_error_msg = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
moderation_msg = "YOUR INPUT VIOLATES OUR CONTENT MODERATION GUIDELINES. PLEASE TRY AGAIN."

LOG_FORMAT = logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s", "%Y-%m-%d %H:%M:%S")


def build_logger(logger_name, logger_filename):
    """Return a logger whose lines also go to constants.LOGDIR/logger_filename, a new file each day (UTC).

    As in LLaVA, what the process prints goes to that file too. All loggers do, made before or after, and a second call
    with the same file adds nothing (LLaVA keeps the first file of a process for every logger).
    """
    root = logging.getLogger()
    if not root.handlers:
        # Before the streams are replaced: the terminal is still theirs.
        logging.basicConfig(level=logging.INFO)
    root.handlers[0].setFormatter(LOG_FORMAT)
    os.makedirs(constants.LOGDIR, exist_ok=True)
    path = os.path.abspath(os.path.join(constants.LOGDIR, logger_filename))
    if path not in [getattr(handler, "baseFilename", None) for handler in root.handlers]:
        file = TimedRotatingFileHandler(path, when="D", utc=True, encoding="utf-8", errors=ESCAPED)
        file.setFormatter(LOG_FORMAT)
        root.addHandler(file)
    for name, level in (("stdout", logging.INFO), ("stderr", logging.ERROR)):
        if not isinstance(getattr(sys, name), StreamToLogger):
            logging.getLogger(name).setLevel(level)
            setattr(sys, name, StreamToLogger(logging.getLogger(name), level, getattr(sys, name)))
    named = logging.getLogger(logger_name)
    named.setLevel(logging.INFO)
    return named


class StreamToLogger:
    """A stream that logs every complete line that is written to it.

    terminal: the stream whose place it takes, which answers everything but writing (LLaVA: always standard output).
    """

    def __init__(self, logger, log_level=logging.INFO, terminal=None):
        self.terminal = sys.stdout if terminal is None else terminal
        self.logger = logger
        self.log_level = log_level
        self.linebuf = ""

    def __getattr__(self, attr):
        return getattr(self.terminal, attr)

    def write(self, buf):
        """Log the lines that `buf` completes and keep the rest."""
        *lines, self.linebuf = (self.linebuf + buf).split("\n")
        for line in lines:
            self.logger.log(self.log_level, line.rstrip())

    def flush(self):
        """Log what waits for the end of its line."""
        if self.linebuf:
            self.logger.log(self.log_level, self.linebuf.rstrip())
        self.linebuf = ""


def disable_torch_init():
    """Do nothing: models are made without drawing weights that a checkpoint replaces anyway.

    LLaVA turns off the initialisation of torch.nn.Linear and LayerNorm for the rest of the process, whose later layers
    then start from whatever is in memory.
    """


def violates_moderation(text):
    """Raise RuntimeError: what users write is sent nowhere (LLaVA asks a moderation service of OpenAI)."""
    raise RuntimeError(
        "llava_lite sends what users write to no moderation service, so it cannot tell whether a text violates one's "
        "rules; call a service of your choice, or run without --moderate."
    )


def pretty_print_semaphore(semaphore):
    """Return a semaphore's free places and whether it is locked, as LLaVA writes it."""
    if semaphore is None:
        return "None"
    return f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"


def order_pick_k(lst, k):
    """Return `lst` if it has at most k entries, else k of them, drawn at random and left in their order."""
    if len(lst) <= k:
        return lst
    logger.warning("%d of %d are taken, drawn at random.", k, len(lst))
    return [lst[i] for i in sorted(random.sample(range(len(lst)), k))]


class HookTool:
    """Keeps the newest output of the module it is hooked to, on the CPU, as `fea`."""

    def __init__(self):
        self.fea = None

    def hook_fun(self, module, fea_in, fea_out):
        """Keep the output of a module; for `register_forward_hook`."""
        self.fea = fea_out.detach().cpu()


def get_gating_logit_by_hook(model):
    """Return a HookTool for each layer with experts; after a forward, `fea` holds the router's logits [S, E].

    The routers of llava_lite are looked at, whose logits are those of MoE-LLaVA's `wg`; without padding S is all
    tokens of the batch, images included. To count where tokens go, `llava_lite.eval.expert_routes` needs no hooks.
    """
    hooks = []
    for block in model.moe_layers().values():
        hook = HookTool()
        block.gate.register_forward_hook(hook.hook_fun)
        hooks.append(hook)
    return hooks
