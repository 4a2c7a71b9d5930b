"""Images to text by character recognition: rapidocr with the models that its wheel brings, or tesseract where that is what is installed."""

import functools
import io
import shutil
import subprocess
import warnings
from typing import Any

from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.options import Options

_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP")
_MOST_PIXELS = 64_000_000
_MOST_FRAMES = 500
_LONGEST_SIDE = 4_000
_TESSERACT_SECONDS = 120
_TESSERACT = {"de": "deu", "fr": "fra", "es": "spa", "it": "ita", "pt": "por", "nl": "nld", "ru": "rus", "zh": "chi_sim", "ja": "jpn", "en": "eng"}
INSTALL = "install cllm[ocr] (pip install 'cllm[ocr]')"


def read(data: bytes, name: str, options: Options) -> list[Document]:
    """One document with the text of an image, of all pages of a TIFF. Raises Unreadable, also where recognition was not asked for."""
    if not data:
        raise Unreadable("empty: the file has no bytes")
    if not options.ocr:
        raise Unreadable("empty: an image, whose text is read with --ocr and the extra cllm[ocr]")
    from PIL import Image, ImageOps, ImageSequence

    pages, note = [], ""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > _MOST_PIXELS:
                raise Unreadable(f"too large: the image has {image.width:,} x {image.height:,} pixels")
            frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1  # the frames of an animation are no pages
            for number, frame in enumerate(ImageSequence.Iterator(image)):
                if number >= min(frames, _MOST_FRAMES):
                    note = f"truncated after {_MOST_FRAMES} pages" if frames > _MOST_FRAMES else ""
                    break
                pages.append(recognise(_plain(ImageOps.exif_transpose(frame)), options))
        except Unreadable:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise Unreadable("too large: the image unpacks to more pixels than a page has") from None
        except (
            OSError,
            SyntaxError,
            ValueError,
            EOFError,
            TypeError,
            IndexError,
            KeyError,
            AttributeError,
            ZeroDivisionError,
            OverflowError,
        ) as error:
            if not pages:
                raise Unreadable("damaged: the image cannot be decoded, or is of another kind than PNG, JPEG, TIFF, WebP, GIF and BMP") from error
            note = f"damaged after page {len(pages)}"
    text = "\n\n".join(page for page in pages if page)
    if not text:
        raise Unreadable("empty: no characters were recognised in the image")
    return [Document(text, note=note)]


def recognise(image: Any, options: Options) -> str:
    """The text in an RGB image of Pillow, line by line. Raises Unreadable where no recogniser is installed."""
    engine = _engine()
    if engine is not None:
        import numpy as np

        result = engine(np.asarray(image)[:, :, ::-1])
        boxes, texts = getattr(result, "boxes", None), getattr(result, "txts", None)
        return "" if boxes is None or texts is None else in_lines([(box, text) for box, text in zip(boxes.tolist(), texts)])
    if program := shutil.which("tesseract"):
        return _by_tesseract(program, image, options)
    raise Unreadable(f"empty: text in images needs a recogniser; {INSTALL}")


def in_lines(found: list[tuple[list[list[float]], str]]) -> str:
    """Pieces of text with the corners of their boxes, from top to bottom and in each line from left to right."""
    pieces = []
    for box, text in found:
        ys = [corner[1] for corner in box]
        pieces.append(((min(ys) + max(ys)) / 2, max(ys) - min(ys), min(corner[0] for corner in box), text))
    pieces.sort()
    lines: list[list[tuple[float, float, float, str]]] = []
    for piece in pieces:
        if lines and piece[0] - lines[-1][0][0] < 0.5 * max(1.0, min(piece[1], lines[-1][0][1])):
            lines[-1].append(piece)
        else:
            lines.append([piece])
    return "\n".join(" ".join(piece[3] for piece in sorted(line, key=lambda piece: piece[2])) for line in lines).strip()


def _plain(image: Any) -> Any:
    """An image in RGB on white, no larger than the recogniser can use."""
    from PIL import Image

    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.new("RGBA", clear.size, "white")
        image.alpha_composite(clear)
    image = image.convert("RGB")
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return image


@functools.cache
def _engine() -> Any | None:
    """The recogniser of this process; None where rapidocr is not installed. Its models come with it, so that nothing is ever downloaded."""
    try:
        from rapidocr import RapidOCR
    except ImportError:
        return None
    threads = {"EngineConfig.onnxruntime.intra_op_num_threads": 1, "EngineConfig.onnxruntime.inter_op_num_threads": 1}
    return RapidOCR(params={"Global.log_level": "critical", **threads})


def _by_tesseract(program: str, image: Any, options: Options) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    languages = "+".join(_TESSERACT[code] for code in options.languages if code in _TESSERACT) or "eng"
    command = [program, "stdin", "stdout", "-l", languages]
    try:
        done = subprocess.run(command, input=file.getvalue(), capture_output=True, timeout=_TESSERACT_SECONDS, env={"OMP_THREAD_LIMIT": "1"})
    except (OSError, subprocess.TimeoutExpired):
        raise Unreadable("time limit: tesseract did not answer") from None
    if done.returncode:
        raise Unreadable("empty: tesseract could not read the image; is the data of its language installed?")
    return done.stdout.decode("utf-8", "replace").strip()
