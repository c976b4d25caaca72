"""Videos into tensors: evenly spaced frames by PyAV, and the pixels that Video-LLaVA was trained to see."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from llava.images import load_image
from llava.mm_utils import process_images, processor_resolution

FRAMES = 8  # of each video, where nothing else is asked for: Video-LLaVA's

Visual = Image.Image | Sequence[Image.Image]  # an image, or the frames of a video


@dataclass(frozen=True)
class Limits:
    """What a video may have at most that comes from somebody else.

    Attributes:
        kind: ffmpeg's name of the format as which it is read. (In some formats a file names others, which ffmpeg would
            open; ``mov``, ``matroska`` and ``gif`` have none.)
        seconds: that it lasts, as the file says.
        frames: in the file, all of which are decoded.
        frame_pixels: width times height of a frame.
        pixels: of all frames of the file together.
    """

    kind: str
    seconds: float
    frames: int
    frame_pixels: int
    pixels: int


def load_video(path: str | Path, frames: int | None = None) -> list[Image.Image]:
    """Open a video file as RGB frames, evenly spaced from the first to the last.

    Args:
        path: anything that ffmpeg reads.
        frames: how many; None takes :data:`FRAMES`, some of them more than once where the video has fewer.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: PyAV is not installed.
        ValueError: it is damaged, an image or without video, or has fewer frames than asked for.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"frames={frames}: ask for at least one")
    return read_frames(Path(path), str(path), frames or FRAMES, repeat=frames is None)


def read_frames(
    source: Path | bytes, name: str, count: int = FRAMES, *, repeat: bool = True, limits: Limits | None = None
) -> list[Image.Image]:
    """RGB frames of a video, evenly spaced from the first to the last: ``np.linspace(0, n - 1, count, dtype=int)``.

    The n frames are those that can be decoded, whatever the file says and however long each is shown. No more than
    ``count`` of them are held at a time.

    Args:
        source: the file, or what is in it: anything that ffmpeg reads.
        name: for messages.
        count: how many.
        repeat: where there are fewer than asked for, some come more than once (Video-LLaVA's protocol); else that is an
            error.
        limits: what it may have at most; what has more is not decoded.

    Returns:
        ``count`` images of the video's size.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: PyAV is not installed.
        ValueError: it is damaged, it is an image, it has no video, or the video too few frames or more than its limits;
            the message has the name.
    """
    av = _av()
    opened = partial(_opened, source, name, limits)
    try:
        packets = _count_packets(opened, name, limits)
        frames, total = _decode(opened, _spread(packets, count), "AUTO")
        if total != packets:
            # A packet need not be a frame, as with edit lists. Or it is damaged: ffmpeg's threads may pass over that.
            _, total = _decode(opened, [], "NONE")
            frames, _ = _decode(opened, _spread(total, count), "NONE")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no video {name}") from None
    except (av.error.FFmpegError, OSError) as error:  # OSError: ffmpeg seeks before the start of some
        raise ValueError(f"{name} cannot be read as a video ({error.strerror}): fetch it again") from error
    if not total:
        raise ValueError(f"{name} has no frames: fetch it again")
    if total < count and not repeat:
        raise ValueError(f"{name} has only {total} frames, but {count} were asked for: ask for at most {total}")
    return [frames[index] for index in _spread(total, count)]


Opened = Callable[[], AbstractContextManager[tuple[Any, Any]]]
"""Opens the file anew: PyAV's container, and its video stream."""


def _av() -> Any:
    try:
        import av  # noqa: PLC0415 - of the extras `video` and `eval`; everything else does without
    except ImportError as error:
        raise ImportError('reading videos needs PyAV: pip install "llava-visionzip[video]"') from error
    return av


def _spread(total: int, count: int) -> list[int]:
    return np.linspace(0, total - 1, count, dtype=int).tolist() if total else []


def _count_packets(opened: Opened, name: str, limits: Limits | None) -> int:
    with opened() as (container, stream):
        most = None
        if limits is not None:
            most = min(limits.frames, limits.pixels // (stream.width * stream.height))
        count = 0
        for packet in container.demux(stream):
            count += packet.size > 0
            if most is not None and count > most:
                raise ValueError(
                    f"{name} has more than {most} frames of {stream.width} x {stream.height} pixels: cut it, or scale "
                    "it down"
                )
        return count


def _decode(opened: Opened, wanted: Iterable[int], threads: str) -> tuple[dict[int, Image.Image], int]:
    """The frames at some places, and how many frames there are."""
    places, frames, total = set(wanted), {}, 0
    with opened() as (container, stream):
        stream.thread_type = threads
        for frame in container.decode(stream):
            if total in places:  # upright: phones note how they were held
                frames[total] = frame.to_image().rotate(frame.rotation, expand=True)
            total += 1
    return frames, total


@contextmanager
def _opened(source: Path | bytes, name: str, limits: Limits | None) -> Iterator[tuple[Any, Any]]:
    av, kind = _av(), limits and limits.kind
    # A file object: ffmpeg would take some names for patterns or protocols.
    with (
        source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file,
        av.open(file, format=kind, metadata_errors="ignore") as container,
    ):
        if _is_still(container):
            raise ValueError(f"{name} is an image, not a video: give it as an image")
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:  # the cover of a song
            raise ValueError(f"{name} has no video stream: fetch it again")
        if limits is not None:
            _check_limits(container, stream, name, limits)
        yield container, stream


def _check_limits(container: Any, stream: Any, name: str, limits: Limits) -> None:
    """Check what the file says of itself; frames that become larger than it says are not decoded."""
    if container.duration is not None and (seconds := container.duration / 1e6) > limits.seconds:
        raise ValueError(f"{name} lasts {seconds:.0f} s, more than {limits.seconds:g}: cut it")
    if not 0 < stream.width * stream.height <= limits.frame_pixels:
        raise ValueError(
            f"{name} has frames of {stream.width} x {stream.height} pixels, more than "
            f"{limits.frame_pixels / 1e6:.1f} million: scale it down"
        )
    stream.codec_context.options = {"max_pixels": str(2 * limits.frame_pixels)}  # some decoders need room around them


def _is_still(container: Any) -> bool:
    """Whether a file is an image, by ffmpeg's name of its format, or the brand of those that videos have too (HEIC)."""
    name = container.format.name
    brand = container.metadata.get("major_brand")
    return name in ("image2", "ico") or name.endswith("_pipe") or brand in ("avif", "heic", "heix", "mif1")


# Into tensors


def process_videos(videos: Sequence[Sequence[Image.Image]], image_processor: Any) -> list[Tensor]:
    """Frames as Video-LLaVA's encoder was trained to see them.

    Values from 0 to 1, normalised, the short side scaled to the encoder's edge (bilinear, of the tensor, without
    smoothing), the centre. Source: Video-LLaVA's ``processing_video.py``; it also mirrors half of all videos at random,
    even in evaluation, which is left out.

    Args:
        videos: the frames of each, RGB, from :func:`load_video`.
        image_processor: third value of ``load_pretrained_model``: has the mean, the deviation and the size.

    Returns:
        (3, T, h, w) float32 of each video.

    Raises:
        TypeError: a video is not a sequence of PIL images.
        ValueError: a video has no frames.
    """
    edge = processor_resolution(image_processor)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
    )
    for index, frames in enumerate(videos):
        check_frames(frames, f"videos[{index}]")
    return [torch.stack([_pixels(frame, edge, mean, std) for frame in frames], dim=1) for frames in videos]


def check_frames(frames: Any, name: str) -> None:
    """Check that something is the frames of a video.

    Raises:
        TypeError: it is not a sequence of PIL images.
        ValueError: it is empty.
    """
    if not isinstance(frames, Sequence) or not all(isinstance(frame, Image.Image) for frame in frames):
        raise TypeError(
            f"{name} is a {type(frames).__name__}, not the frames of a video: open files with llava.video.load_video, "
            "and give images to llava.mm_utils.process_images"
        )
    if not frames:
        raise ValueError(f"{name} has no frames: give at least one")


def _pixels(frame: Image.Image, edge: int, mean: Tensor, std: Tensor) -> Tensor:
    """One frame: (3, edge, edge)."""
    values = torch.from_numpy(np.array(load_image(frame))).permute(2, 0, 1).float() / 255
    width, height = frame.size
    long = math.floor(max(width, height) / min(width, height) * edge)
    size = (long, edge) if width < height else (edge, long)
    scaled = F.interpolate(((values - mean) / std)[None], size=size, mode="bilinear", align_corners=False)[0]
    top, left = (round((length - edge) / 2) for length in size)
    return scaled[:, top : top + edge, left : left + edge]


def process_visuals(
    visuals: Sequence[Visual], image_processor: Any, model: Any
) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Images and videos as a model takes them: a video as one tensor where it ``takes_videos``, else as its frames.

    Args:
        visuals: images, and frames of videos.
        image_processor: the model's.
        model: says whether it ``takes_videos``, and how (``video_pixels``).

    Returns:
        For its ``images`` and ``image_sizes``: tensors, and (width, height) of each.

    Raises:
        TypeError: one is neither.
        ValueError: a video has no frames.
    """
    tensors: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    for visual in visuals:
        if model.takes_videos and not isinstance(visual, Image.Image):
            tensors.append(model.video_pixels(visual, image_processor))
            sizes.append(visual[0].size)
        else:
            if isinstance(visual, str | Path):  # else its letters would be taken for frames
                raise TypeError(f"{str(visual)!r} is not a PIL image: open it with llava.mm_utils.load_image")
            given = [visual] if isinstance(visual, Image.Image) else visual
            images = [load_image(image) for image in given]  # upright before their sizes are taken
            tensors += process_images(images, image_processor, model.config)
            sizes += [image.size for image in images]
    return tensors, sizes
