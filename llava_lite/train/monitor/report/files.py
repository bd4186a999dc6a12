"""Read the files of a run, and keep what is wrong with each: it is missing, damaged, or cannot be read."""

from pathlib import Path

from llava_lite.train.monitor.log_lines import FileState, read_lines, read_object

RUN, STATE, CONFIG, REPORT = "run.json", "trainer_state.json", "config.json", "report.html"
# What the fields of run.json are.
TYPES = {"data": dict, "experts": dict, "parameters": dict, "settings": dict, "versions": dict, "starts": list}
TYPES |= {"end": dict, "images": dict, "given": list}
# JSON's words for what Python reads.
WORDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}


class RunFiles:
    """The files of a directory. faults: {name of a file: a clause that goes after its name}. missing: names."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.faults: dict[str, str] = {}
        self.missing: set[str] = set()

    def note(self, name: str, state: FileState):
        """Keep what is wrong with a file; return its content."""
        if state.fault:
            self.faults[name] = state.fault
        if state.is_missing:
            self.missing.add(name)
        return state.content

    def read_object(self, name: str) -> dict:
        """Return the JSON object of a file, {} without one."""
        return self.note(name, read_object(self.directory / name))

    def read_lines(self, name: str) -> list[dict]:
        """Return the JSON objects of a file of lines, [] without them."""
        return self.note(name, read_lines(self.directory / name))

    def read_record(self) -> dict:
        """Return run.json without the fields that are of another kind than it has."""
        record = self.read_object(RUN)
        wrong = [name for name, kind in TYPES.items() if not isinstance(record.get(name, kind()), kind)]
        if wrong:
            found, expected = WORDS.get(type(record[wrong[0]]), "empty"), WORDS[TYPES[wrong[0]]]
            self.faults[RUN] = f"is damaged ({wrong[0]!r} is {found}, expected {expected})"
        elif not all(isinstance(start, dict) for start in record.get("starts", ())):
            wrong = ["starts"]
            self.faults[RUN] = "is damaged ('starts' holds what is no object)"
        return {name: value for name, value in record.items() if name not in wrong}

    def sentence(self, name: str) -> str | None:
        """Return what is wrong with a file, None where nothing is."""
        return f"{name} {self.faults[name]}." if name in self.faults else None

    @property
    def damaged(self) -> list[str]:
        """Return a sentence for each file that is there and damaged, or cannot be read."""
        return [self.sentence(name) for name in self.faults if name not in self.missing]
