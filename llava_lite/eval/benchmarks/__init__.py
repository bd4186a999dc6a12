"""The benchmarks by name; a new one is a file here and a line in BENCHMARKS."""

from __future__ import annotations

import difflib

from llava_lite.eval.benchmarks.base import Benchmark
from llava_lite.eval.benchmarks.chartqa import ChartQA
from llava_lite.eval.benchmarks.coco import Coco
from llava_lite.eval.benchmarks.docvqa import DocVQA
from llava_lite.eval.benchmarks.easy_vqa import EasyVqa
from llava_lite.eval.benchmarks.gqa import Gqa
from llava_lite.eval.benchmarks.llavabench import LlavaBench
from llava_lite.eval.benchmarks.mmbench import MMBench, MMBenchCN
from llava_lite.eval.benchmarks.mme import Mme
from llava_lite.eval.benchmarks.mmmu import MMMU
from llava_lite.eval.benchmarks.mmvet import MMVet
from llava_lite.eval.benchmarks.pope import Pope
from llava_lite.eval.benchmarks.qbench import QBench
from llava_lite.eval.benchmarks.seed import Seed
from llava_lite.eval.benchmarks.sqa import ScienceQa
from llava_lite.eval.benchmarks.textvqa import TextVqa
from llava_lite.eval.benchmarks.vizwiz import VizWiz
from llava_lite.eval.benchmarks.vqav2 import VqaV2

BENCHMARKS: dict[str, type[Benchmark]] = {
    "vqav2": VqaV2,
    "gqa": Gqa,
    "vizwiz": VizWiz,
    "sqa": ScienceQa,
    "textvqa": TextVqa,
    "pope": Pope,
    "mme": Mme,
    "seed": Seed,
    "mmbench": MMBench,
    "mmbench_cn": MMBenchCN,
    "llavabench": LlavaBench,
    "mmvet": MMVet,
    "qbench": QBench,
    "mmmu": MMMU,
    "chartqa": ChartQA,
    "docvqa": DocVQA,
    "coco": Coco,
    "easy_vqa": EasyVqa,
}
# What other programs call a benchmark, and the directories of LLaVA.
OTHER_NAMES = {"scienceqa": "sqa", "seed_bench": "seed", "seedbench": "seed", "easyvqa": "easy_vqa"}
OTHER_NAMES |= {"mmbench_en": "mmbench", "mm_vet": "mmvet", "q_bench": "qbench", "mmmu_val": "mmmu"}
OTHER_NAMES |= {"llava_bench": "llavabench", "llava_bench_in_the_wild": "llavabench", "coco_captions": "coco"}


def get_benchmark(name: str) -> Benchmark:
    """Return a benchmark by name; ValueError with the known ones for another name."""
    known = name.lower().replace("-", "_")
    known = OTHER_NAMES.get(known, known)
    if known in BENCHMARKS:
        return BENCHMARKS[known]()
    near = difflib.get_close_matches(known, BENCHMARKS, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"there is no benchmark {name!r}.{meant} Known: {', '.join(BENCHMARKS)}.")
