"""Turn the result of a check of annotations into the lines that a run and `llava-lite check` print."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from llava_lite.data.check.text_counts import TextCounts
from llava_lite.data.index.annotations import Annotations
from llava_lite.data.index.cache import get_key

# Records that a line of the report names.
NUM_EXAMPLES = 5


@dataclass
class Report:
    """The result of a check. `annotations` are the usable records, `bad` the others."""

    annotations: Annotations
    bad: list
    num_records: int
    num_with_image: int
    num_tokens: int  # after truncation, with image features
    supervised_fraction: float  # supervised tokens of all before truncation, 0 to 1
    num_truncated: int
    num_other_suffix: int  # images found as .png or .gif where the record says .jpg
    num_turns: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # of each record, both sides [N]
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # tokens before truncation [N]
    empty_answers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # of each record [N]
    text_placeholders: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # of each record [N]
    texts: TextCounts = field(default_factory=TextCounts)
    left_out: dict = field(default_factory=dict)  # `bad` by number over all files
    num_first_pairs: int = 0  # records of several questions whose template uses the first
    num_media: dict[str, int] = field(default_factory=dict)  # records with each kind of media that are one image
    late: dict = field(default_factory=dict)  # records that a resumed run finds bad now; they keep their places

    @property
    def digest(self) -> str:
        """A key for the result; ranks with different digests read different files."""
        return get_key(self.num_records, self.num_tokens, *map(tuple, self.bad))

    def summary(self) -> str:
        """Return the lines that a run prints at its start."""
        num_text = self.num_records - self.num_with_image
        lines = [f"{number(self.num_records, 'record')}: {self.num_with_image:,} with images, {num_text:,} text only"]
        if self.num_records:
            lines += [self._turns(), *self._images(), self._tokens()]
        if self.num_truncated:
            longer = number(self.num_truncated, "record")
            lines.append(f"{longer} longer than --model_max_length, truncated in training")
        if self.num_media:
            named = ", ".join(f"{count:,} {kind}" for kind, count in self.num_media.items())
            lines.append(f"records whose media together are one image, by kind: {named}")
        if self.num_other_suffix:
            lines.append(f"{number(self.num_other_suffix, 'image')} found under another suffix than in their record")
        if self.empty_answers.any():
            count = int(self.empty_answers.sum())
            lines.append(
                f"{number(count, 'answer')} without text, of which only the end token is supervised: "
                f"{self._named(self.empty_answers)}"
            )
        if self.text_placeholders.any():
            count = int((self.text_placeholders > 0).sum())
            lines.append(
                f"{number(count, 'record')} with an image placeholder and no image, used as plain text: "
                f"{self._named(self.text_placeholders)}"
            )
        if self.num_first_pairs:
            lines.append(
                f"{number(self.num_first_pairs, 'record')} of more than one question, of which the template uses the "
                "first; `llava-lite single-turn` makes a record of each"
            )
        if self.annotations.has_groups:
            counts = sorted(Counter(self.annotations.groups).items())
            named = ", ".join(f"{count:,} {name}" for name, count in counts)
            lines.append(f"groups that share no batch: {named}")
        lines += self.texts.lines()
        if self.bad:
            lines.append(f"{number(len(self.bad), 'record')} left out ({get_kinds(self.bad)})")
        return "\n".join(lines)

    def _named(self, counts: np.ndarray) -> str:
        """Return the names of the first records of which `counts` [N] is above zero."""
        places = np.flatnonzero(counts)
        names = ", ".join(self.annotations[i].name for i in places[:NUM_EXAMPLES].tolist())
        return names + (f" and {len(places) - NUM_EXAMPLES:,} more" if len(places) > NUM_EXAMPLES else "")

    def _turns(self) -> str:
        median, most = int(np.median(self.num_turns)), int(self.num_turns.max())
        return f"turns of a record, questions and answers: {median} (median), at most {most}"

    def _images(self) -> list[str]:
        sizes = self.annotations.image_sizes
        sizes = sizes[sizes.min(axis=1) > 0] if len(sizes) else sizes
        if not len(sizes):
            return []
        areas = sizes.astype(np.int64).prod(axis=1)
        shown = [f"{width} x {height}" for width, height in sizes[np.argsort(areas, kind="stable")].tolist()]
        if shown[0] == shown[-1]:
            return [f"{number(len(sizes), 'image')} of {shown[0]} pixels"]
        return [
            f"{number(len(sizes), 'image')} of {shown[len(shown) // 2]} pixels (median), {shown[0]} to {shown[-1]}"
        ]

    def _tokens(self) -> str:
        half, most = np.percentile(self.lengths, (50, 95), method="lower").astype(int).tolist()
        longest = int(self.lengths.argmax())
        return (
            f"{self.num_tokens:,} tokens, {self.supervised_fraction:.1%} of them supervised; a record has {half:,} "
            f"(p50), {most:,} (p95), at most {int(self.lengths[longest]):,}: {self.annotations[longest].name}"
        )


def number(count: int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def get_kinds(bad: list) -> str:
    """Return the number of bad records of each kind."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(Counter(entry.kind for entry in bad).items()))
