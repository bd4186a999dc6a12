"""Turn a directory of images, or a faiss index, into a feature bank: `llava-lite bank IMAGES_OR_INDEX OUT`."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from llava_lite.media.image import ImageError
from llava_lite.media.pixels import load_image
from llava_lite.model.encoders.imagebind.opening import open_imagebind
from llava_lite.model.mixing import FeatureBank
from llava_lite.model.placement import check_device

logger = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif"}


def make_bank(
    source,
    out,
    vision_tower=None,
    batch_size=32,
    num_workers=0,
    device=None,
    bad_image="raise",
    report=print,
) -> FeatureBank:
    """Write the bank of `source` to `out`, a new file, and return it.

    source: a directory, whose images are read in the order of their paths, or the file of a faiss index.
    vision_tower: as in open_imagebind; needed for images. bad_image: `raise` at one that cannot be opened, or `skip`
    and count it. report: called with each line. Raises ValueError with the reason for anything else.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise ValueError(f"{str(out)!r} exists already; name a new file.")
    if batch_size < 1 or num_workers < 0:
        raise ValueError(f"--batch_size is at least 1 and --num_workers 0; got {batch_size} and {num_workers}.")
    if source.is_file():
        bank = read_index(source)
    else:
        bank = encode_directory(source, vision_tower, batch_size, num_workers, device, bad_image, report)
    out.parent.mkdir(parents=True, exist_ok=True)
    bank.save(out)
    report(f"wrote {len(bank)} embeddings of width {bank.width} to {out}")
    return bank


def encode_directory(source, vision_tower, batch_size, num_workers, device, bad_image, report) -> FeatureBank:
    """Return the bank of a directory's images."""
    paths = find_images(source)
    if vision_tower is None:
        raise ValueError("--vision_tower is needed: the ImageBind encoder of the model that will read the bank.")
    check_device(device)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = open_imagebind(vision_tower, modalities=["image"]).to(device)
    images = ImageFiles(paths, model.config.image_size, bad_image)
    loader = DataLoader(images, batch_size, num_workers=num_workers, collate_fn=keep_opened)
    skipped = []

    def batches():
        for pixels, wrong in loader:
            skipped.extend(wrong)
            if pixels is not None:
                yield pixels.to(device)

    bank = FeatureBank.from_images(model, batches())
    for sentence in skipped:
        logger.warning("%s", sentence)
    if skipped:
        report(f"{len(skipped)} of {len(paths)} images were left out: they cannot be opened")
    return bank


class ImageFiles(Dataset):
    """Images as ImageBind reads them, [3, H, W]; or the sentence that says why one cannot be opened."""

    def __init__(self, paths: list[Path], side: int, bad_image: str):
        self.paths, self.side, self.bad_image = paths, side, bad_image

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return load_image(self.paths[index], side=self.side)
        except ImageError as error:
            if self.bad_image == "raise":
                raise
            return str(error)


def keep_opened(items) -> tuple[torch.Tensor | None, list[str]]:
    """Return the images of a batch [B, 3, H, W], None if there is none, and the sentences about the others."""
    opened = [item for item in items if not isinstance(item, str)]
    return (torch.stack(opened) if opened else None), [item for item in items if isinstance(item, str)]


def find_images(directory: Path) -> list[Path]:
    """Return the images below a directory, sorted; ValueError if there are none."""
    if not directory.is_dir():
        raise ValueError(f"{str(directory)!r} is neither a directory of images nor the file of an index.")
    found = sorted(path for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"no images below {str(directory)!r}; their names end with {', '.join(sorted(SUFFIXES))}.")
    return found


def read_index(path: Path) -> FeatureBank:
    """Return the bank of a faiss index, such as knn.index of ImageBind-LLM; ImportError if faiss is not installed.

    A compressed index gives the embeddings that it reconstructs, of whatever length, as the original reads them.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"{str(path)!r} is read as a faiss index, which needs faiss: pip install faiss-cpu. A directory of images "
            "needs nothing."
        ) from error
    try:
        index = faiss.read_index(str(path))
        features = index.reconstruct_n(0, index.ntotal)
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} is no faiss index that gives its embeddings back: {error}") from error
    return FeatureBank(torch.from_numpy(features).half())
