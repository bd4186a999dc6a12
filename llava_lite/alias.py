"""Open this package under the names `llava` and `moellava`, or those of another system, for programs of theirs.

`install("llava")` in a program and `python -m llava_lite.alias SCRIPT ...` lead to the modules of llava_lite
themselves, never to second copies. Importing llava_lite alone changes nothing. `install("llama_adapter")` and
`--system llama_adapter` are for programs of a system of SYSTEMS. Two of these are named `llama`, so one is chosen.

One name is two things: LLaVA's `load_pretrained_model` gives an image processor and a model that generates new tokens
only; MoE-LLaVA's gives a dict of processors and a model that repeats the prompt first. So `moellava.model.builder`
leads to `llava_lite.model.compat.moellava_builder`, which does as MoE-LLaVA does.
"""

import sys
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from os.path import abspath, dirname, isdir, isfile, join, sep

from llava_lite.commands.alias import build_parser

PACKAGE = "llava_lite"
NAMES = ("llava", "moellava")
# What LLaVA's programs import and this package does not need -> what brings it.
OF_LLAVA = dict.fromkeys(("shortuuid", "requests", "pandas"), "'llava-lite[llava]'")
OF_LLAVA |= {name: name for name in ("fastapi", "uvicorn", "openai", "ray", "editdistance", "pycocoevalcap", "httpx")}
OF_LLAVA |= {"cv2": "opencv-python", "fairscale": "fairscale", "torchvision": "torchvision"}
OF_LLAVA |= {"gradio": "gradio", "peft": "'llava-lite[peft]'", "deepspeed": "'llava-lite[train]'"}
# Modules that an other name finds elsewhere than at the same place.
ELSEWHERE = {"moellava.model.builder": "llava_lite.model.compat.moellava_builder"}
# Other systems -> the names that their programs import -> our module; None for a package that only holds others.
SYSTEMS = {
    # LLaMA-Adapter V2: its package is named `llama`.
    "llama_adapter": dict.fromkeys(("llama", "llama.llama_adapter", "llama.utils"), "llava_lite.llama_adapter"),
    # ImageBind-LLM: so is its.
    "imagebind_llm": {
        **dict.fromkeys(("llama", "llama.llama_adapter", "llama.utils"), "llava_lite.imagebind_llm"),
        "ImageBind": "llava_lite.imagebind_llm",
        "ImageBind.data": "llava_lite.imagebind_llm.data",
    },
    # LLaMA2-Accessory: from the root of its repository, and from within its directory `accessory`.
    "accessory": {
        "accessory": None,
        "accessory.model": None,
        "accessory.model.meta": "llava_lite.accessory",
        "model": None,
        "model.meta": "llava_lite.accessory",
    },
}


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
        """Return the module that the other name means."""
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


class SystemNames:
    """Answers imports of the names of one system of SYSTEMS.

    A package is made here, with the public names of our module; a module in it is ours itself. What a package lacks
    comes from directories of its name on the path, as in a copy of the system.
    """

    def __init__(self):
        self.homes = {}

    def find_spec(self, fullname, path=None, target=None):
        """Return a spec that this object loads, None for names that are not of the system."""
        if fullname not in self.homes:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in self.homes)
        spec = ModuleSpec(fullname, self, is_package=is_package)
        if is_package:
            last = fullname.rpartition(".")[2]
            places = [join(entry, last) for entry in (sys.path if path is None else path)]
            spec.submodule_search_locations = [place for place in places if isdir(place)]
        return spec

    def create_module(self, spec):
        """Return our module, None for a package, which Python makes."""
        if spec.submodule_search_locations is not None:
            return None
        module = import_module(self.homes[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        """Give a package the names of our module, and our module its own spec back."""
        spec = module.__spec__
        if spec.submodule_search_locations is None:
            module.__spec__ = spec.loader_state
        elif (home := self.homes[spec.name]) is not None:
            vars(module).update((k, v) for k, v in vars(import_module(home)).items() if not k.startswith("_"))


_FINDER, _SYSTEM = OtherNames(), SystemNames()


def own_name(fullname):
    """Return the name in this package of a module under an other name: llava.mm_utils is llava_lite.mm_utils."""
    _, dot, rest = fullname.partition(".")
    return ELSEWHERE.get(fullname, f"{PACKAGE}{dot}{rest}")


def install(*names):
    """Make each of `names` (default: llava and moellava) this package, from now on and in this process.

    A name may be a system of SYSTEMS, whose own names then lead here. Raises ValueError for any other name,
    ImportError if a different package of that name has been imported already, or another system has it.
    """
    known = (*NAMES, *SYSTEMS)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown name {unknown[0]!r}; known: {', '.join(known)}.")
    for name in names or NAMES:
        if name in SYSTEMS:
            _install_system(name)
            continue
        if _FINDER not in sys.meta_path:
            sys.meta_path.insert(0, _FINDER)
        present = sys.modules.get(name)
        if present is not None and present is not sys.modules[PACKAGE]:
            where = getattr(present, "__file__", "elsewhere")
            raise ImportError(f"{name!r} is imported already, from {where}; install the name before its first import.")
        sys.modules[name] = sys.modules[PACKAGE]


def _install_system(system):
    """Let the names of a system of SYSTEMS lead here."""
    wanted = SYSTEMS[system]
    for name in wanted:
        present = sys.modules.get(name)
        if _SYSTEM.homes.get(name, wanted[name]) != wanted[name]:
            raise ImportError(
                f"{name!r} is that of {_SYSTEM.homes[name]} in this process, and {system} has one too; take one of "
                "them a process."
            )
        if present is not None and name not in _SYSTEM.homes:
            where = getattr(present, "__file__", "elsewhere")
            raise ImportError(f"{name!r} is imported already, from {where}; install {system!r} before its import.")
    _SYSTEM.homes |= wanted
    if _SYSTEM not in sys.meta_path:
        sys.meta_path.insert(0, _SYSTEM)


def main(argv=None):
    """Run a script or, after -m, a module, whose imports of LLaVA or of another system lead to this package."""
    import runpy

    parser = build_parser()
    options = parser.parse_args(argv)
    script, is_module = options.script, options.module
    known = (NAMES[0], *SYSTEMS)
    if options.system not in known:
        parser.error(f"unknown system {options.system!r}; known: {', '.join(known)}.")
    install(*([] if options.system == NAMES[0] else [options.system]))
    if is_module:
        script, is_module = _module_or_file(script)
    if not is_module and not isfile(script):
        what = f"there is no module {options.script!r}, and" if options.module else "there is"
        parser.exit(2, f"{parser.prog}: {what} no file {script!r}.\n")
    sys.argv[:] = [script, *options.arguments]
    with _device(), _advice_to_install():
        if is_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
            return
        # As Python does for a script: its directory comes first, in place of that of this module.
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
    top = name.partition(".")[0]
    if isfile(file) and top in NAMES:
        print(f"{name} is that of {PACKAGE}; for the file, leave out -m: {file}", file=sys.stderr)
    # By its own name, it has a file, which some libraries ask of every module.
    return own_name(name) if top in NAMES else name, True


def _checkout_of(script):
    """Return the directory that holds the `llava` or `moellava` which a script is part of, None if it is of none."""
    parts = abspath(script).split(sep)
    for i in range(len(parts) - 2, 0, -1):
        if parts[i] in NAMES:
            return sep.join(parts[:i])
    return None


@contextmanager
def _device():
    """Let a program that sends tensors to CUDA run on a machine without it, with a message."""
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
def _advice_to_install():
    """End the process with a sentence if a program imports what its own installation brings and ours does not."""
    try:
        yield
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        if top == "SPHINX":
            sys.exit(f"{PACKAGE}.alias: the program imports 'SPHINX', whose mixtures of encoders are not supported.")
        if top in {name.partition(".")[0] for name in _SYSTEM.homes}:
            sys.exit(
                f"{PACKAGE}.alias: the program imports {error.name!r}, which {PACKAGE} does not have; it has "
                f"{', '.join(_SYSTEM.homes)}. Run the program from a copy of the system, which brings the rest."
            )
        if top not in OF_LLAVA:
            raise
        sys.exit(f"{PACKAGE}.alias: the program imports {error.name!r}: pip install {OF_LLAVA[top]}")


if __name__ == "__main__":
    # As the module itself: this file runs under the name "__main__", and its finder would be a second one.
    import_module(f"{PACKAGE}.alias").main()
