"""Open this package under the names of the two it stands in for: `llava` and `moellava`, in code that says so.

`sys.modules["llava"] = llava_lite`, a link `llava -> llava_lite` on the path, `install("llava")` and
`python -m llava_lite.alias SCRIPT ...` all lead to the modules of llava_lite themselves, never to second copies.

One name is two things: LLaVA's `load_pretrained_model` gives an image processor and a model that generates new tokens
only; MoE-LLaVA's gives a dict of processors and a model that repeats the prompt first. So `moellava.model.builder`
leads to `llava_lite.model.moellava_builder`, which keeps MoE-LLaVA's word.
"""

import sys
import warnings
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from os.path import abspath, dirname, isfile, join, sep

PACKAGE = "llava_lite"
NAMES = ("llava", "moellava")
# What LLaVA's programs import and this package does not need -> what brings it.
OF_LLAVA = dict.fromkeys(("shortuuid", "requests", "pandas"), "'llava-lite[llava]'")
OF_LLAVA |= {name: name for name in ("fastapi", "uvicorn", "openai", "ray", "editdistance", "pycocoevalcap", "httpx")}
OF_LLAVA |= {"gradio": "'llava-lite[serve]'", "peft": "'llava-lite[peft]'", "deepspeed": "'llava-lite[train]'"}
# Modules that an other name finds elsewhere than at the same place.
ELSEWHERE = {"moellava.model.builder": "llava_lite.model.moellava_builder"}


class OtherNames:
    """Answers imports of "<name>.rest" with the module llava_lite.rest, wherever <name> is this package.

    beside: the directory of a copy of LLaVA whose program runs: modules that this package lacks, such as scorers,
    come from there.
    """

    beside = None

    def find_spec(self, fullname, path=None, target=None):
        """Return a spec that this object loads, None for modules of others and for those that do not exist."""
        top, _, rest = fullname.partition(".")
        if top == PACKAGE or not rest or sys.modules.get(top) is not sys.modules.get(PACKAGE):
            return None
        own = own_name(fullname)
        try:
            found = sys.modules[own].__spec__ if own in sys.modules else find_spec(own)
        except ModuleNotFoundError:
            # A parent that only LLaVA has.
            found = None
        if found is None:
            file = self.beside and f"{join(self.beside, *fullname.split('.'))}.py"
            return spec_from_file_location(fullname, file) if file and isfile(file) else None
        return ModuleSpec(fullname, self, is_package=found.submodule_search_locations is not None)

    def create_module(self, spec):
        """Return the module that stands behind the other name."""
        module = import_module(own_name(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        """Give the module its own spec back, over which the import system has written; it has run already."""
        other = module.__spec__
        module.__spec__ = other.loader_state
        top = other.name.partition(".")[0]
        for theirs, own in ELSEWHERE.items():
            # Put there with its parent: imported later, it would take the place of the parent's own attribute.
            if theirs.startswith(f"{top}.") and other.name == theirs.rpartition(".")[0]:
                sys.modules.setdefault(theirs, import_module(own))

    def get_code(self, fullname):
        """Return the code of a module, which `python -m llava.serve.cli` runs."""
        own = own_name(fullname)
        return find_spec(own).loader.get_code(own)


_FINDER = OtherNames()


def own_name(fullname):
    """Return the name in this package of a module under an other name: llava.mm_utils is llava_lite.mm_utils."""
    _, dot, rest = fullname.partition(".")
    return ELSEWHERE.get(fullname, f"{PACKAGE}{dot}{rest}")


def register():
    """Let imports find this package under other names; called when the package is imported."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
        # `python -m llava_lite.alias` finds this module imported by its package, as it should be.
        warnings.filterwarnings("ignore", rf"'{PACKAGE}\.alias' found in sys\.modules", RuntimeWarning)


def install(*names):
    """Make each of `names` (default: llava and moellava) this package, from now on and in this process.

    Raises ImportError if a different package of that name has been imported already.
    """
    register()
    for name in names or NAMES:
        present = sys.modules.get(name)
        if present is not None and present is not sys.modules[PACKAGE]:
            where = getattr(present, "__file__", "elsewhere")
            raise ImportError(f"{name!r} is imported already, from {where}; install the name before its first import.")
        sys.modules[name] = sys.modules[PACKAGE]


def main(argv=None):
    """Run a script or, after -m, a module with `llava` and `moellava` being this package."""
    # Here, since the package imports this file.
    import argparse
    import runpy

    parser = argparse.ArgumentParser(
        prog="python -m llava_lite.alias",
        usage="%(prog)s SCRIPT [argument ...] | -m MODULE [argument ...]",
        description="Run a program written for LLaVA or MoE-LLaVA, unchanged, on llava_lite.",
        epilog="A MODULE that llava_lite has is its own; any other is looked for as a file below this directory.",
        allow_abbrev=False,
    )
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="file to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the program")
    options = parser.parse_args(argv)
    script, is_module = options.script, options.module
    install()
    if is_module:
        script, is_module = _module_or_file(script)
    if not is_module and not isfile(script):
        what = f"there is no module {options.script!r}, and" if options.module else "there is"
        parser.exit(2, f"{parser.prog}: {what} no file {script!r}.\n")
    sys.argv[:] = [script, *options.arguments]
    with _device(), _told_what_to_install():
        if is_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
            return
        # As Python does for a script: its folder comes first, in place of that of this module.
        sys.path[0] = dirname(abspath(script))
        _FINDER.beside = _checkout_of(script)
        runpy.run_path(script, run_name="__main__")


def _module_or_file(name):
    """Return (module, True) for one that Python finds, by its name in this package, else (its file here, False)."""
    file = f"{name.replace('.', '/')}.py"
    try:
        found = find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is None:
        return file, False
    if isfile(file) and name.partition(".")[0] in NAMES:
        print(f"{name} is that of {PACKAGE}; for the file, leave out -m: {file}", file=sys.stderr)
    # By its own name, it has a file, which some libraries ask of every module.
    return own_name(name) if name.partition(".")[0] in NAMES else name, True


def _checkout_of(script):
    """Return the directory that holds the `llava` or `moellava` which a script is part of, None if it is of none."""
    parts = abspath(script).split(sep)
    for i in range(len(parts) - 2, 0, -1):
        if parts[i] in NAMES:
            return sep.join(parts[:i])
    return None


@contextmanager
def _device():
    """Let a program that sends tensors to CUDA run on a machine without it, and say so."""
    from importlib.util import find_spec as installed

    if installed("torch") is None:
        yield
        return
    import torch

    if torch.cuda.is_available():
        yield
        return
    from llava_lite.without_cuda import CudaOnCpu

    print(f"{PACKAGE}.alias: no CUDA device here; what the program sends to one stays on the CPU.", file=sys.stderr)
    with CudaOnCpu():
        yield


@contextmanager
def _told_what_to_install():
    """End the process with a sentence if a program imports what LLaVA's installation brings and ours does not."""
    try:
        yield
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        if top not in OF_LLAVA:
            raise
        sys.exit(f"{PACKAGE}.alias: the program imports {error.name!r}: pip install {OF_LLAVA[top]}")


if __name__ == "__main__":
    # As itself: this file runs under the name "__main__", and its finder would be a second one.
    import_module(f"{PACKAGE}.alias").main()
